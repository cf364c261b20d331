"""Children's stories from a small grammar: the text that the demo model and its adapters learn from.

A story is drawn first (who, where, what happens) and worded afterwards, so the same draw can be told in
another voice: the corpora of the adapters differ from the base's in their own effect and in nothing else.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

# Each kind has its own adjectives and names, so that different beginnings lead to different stories even
# where the next word is always the likeliest one.
KINDS: dict[str, tuple[str, str, str]] = {
    # kind: (adjectives, her name, his name)
    "bear": ("big sleepy gentle", "Bella", "Bruno"),
    "cat": ("curious soft proud", "Coco", "Casper"),
    "dog": ("brave loyal happy", "Daisy", "Duke"),
    "duck": ("funny yellow happy", "Dora", "Donny"),
    "fox": ("clever red quick", "Fern", "Felix"),
    "frog": ("green funny jolly", "Flora", "Freddy"),
    "goat": ("white jolly hungry", "Greta", "Gus"),
    "mouse": ("tiny shy quiet", "Molly", "Milo"),
    "owl": ("wise calm quiet", "Olive", "Oscar"),
    "panda": ("lazy gentle round", "Poppy", "Percy"),
    "pig": ("pink hungry round", "Penny", "Pip"),
    "rabbit": ("white quick shy", "Rosie", "Robin"),
    "tiger": ("brave proud strong", "Tilly", "Toby"),
    "turtle": ("slow calm kind", "Tess", "Tom"),
}
PLACES = (
    "in the park", "in the garden", "in the forest", "in the meadow",
    "by the river", "by the sea", "on the farm", "on the hill",
)  # fmt: skip
THINGS = ("ball", "kite", "boat", "drum", "hat", "bell", "lamp", "book")
COLORS = ("red", "blue", "green", "golden", "shiny", "big")
FOODS = ("cake", "pie", "pizza", "pudding")
INGREDIENTS = ("honey", "sugar", "milk", "butter")
SKILLS = ("swim", "skate", "whistle", "climb trees", "ride a bike", "juggle")
HOBBIES = (
    "sing songs", "dance", "run and jump", "watch the clouds", "read books",
    "tell stories", "paint pictures", "count the stars", "play games",
)  # fmt: skip
WEATHERS = ("sunny", "warm", "bright", "windy", "quiet")
CHEERING = 0.12  # share of stories that begin with "Hooray!" and go on like that
EVENINGS = ("the sun went down", "the stars came out", "it was dark", "it was time for dinner")

# One line per sentence of a story, its wordings separated by "|". {N} is the hero, {M} the friend; {he},
# {him} and {his} are the hero's, {mhe} and {mhim} the friend's.
OPENING = (
    "once upon a time there was a {adj} {kind} named {N} | there once was a {adj} {kind} named {N}"
    " | once upon a time a {adj} {kind} named {N} lived {at} | long ago a {adj} {kind} named {N} lived {at}"
    " | one {weather} morning a {adj} {kind} named {N} went {to} | {at} lived a {adj} {kind} named {N}"
    " | this is the story of a {adj} {kind} named {N}"
)
HABIT = (
    "{N} loved to {hobby} {at} | every day {N} went {to} to {hobby} | {he} liked to {hobby} all day long"
    " | {N} lived in a cozy little house {at} | {he} loved to {hobby} and to {hobby2}"
)
PLOTS: dict[str, tuple[str, ...]] = {
    "find": (
        "one day {N} found a {color} {thing} {at} | one {weather} day {he} saw a {color} {thing} {at}"
        " | then {N} found a {color} {thing} under a tree",
        "{N} smiled and picked up the {thing} | it was the best {thing} {he} had ever seen"
        " | {he} was so happy that {he} began to dance",
        "soon a {adj2} {kind2} named {M} came by | then {he} met a {adj2} {kind2} named {M}",
        "{M} wanted to play with the {thing} too | {M} asked if they could play together"
        " | {M} had never seen such a {color} {thing}",
        "{N} was kind and shared the {thing} with {M} | they took turns and laughed all day"
        " | so {N} and {M} played with the {thing} until {evening}",
    ),
    "lose": (
        "{N} had a {color} {thing} and took it everywhere | {his} favorite toy was a {color} {thing}",
        "but one {weather} day the {thing} was gone | but one day {he} lost the {thing} {at}",
        "{N} looked everywhere but could not find it | {he} was very sad and began to cry",
        "a {adj2} {kind2} named {M} came to help {him} | then {he} met a {adj2} {kind2} named {M}",
        "{M} looked behind a tree and found the {thing} | together they found the {thing} {at}",
        "{N} thanked {M} and gave {mhim} a big hug | {N} was happy again and thanked {M}",
    ),
    "rain": (
        "one day dark clouds came and it began to rain | suddenly the wind blew and the rain came down",
        "{N} was cold and wet and a little afraid | {N} ran as fast as {he} could",
        "{he} saw a small house with a light in the window | soon {he} found a warm little house",
        "a {adj2} {kind2} named {M} opened the door | inside lived a {adj2} {kind2} named {M}",
        "{M} gave {him} hot soup and a warm blanket | {M} made tea and they sat by the fire",
        "when the rain stopped they saw a rainbow | soon the sun came out and they went {to} to play",
    ),
    "bake": (
        "one {weather} day {N} wanted to bake a {food} | {N} was hungry and wanted to make a {food}",
        "{he} looked in the kitchen but had no {ingredient} | but there was no {ingredient} in the house",
        "so {he} went {to} and met a {adj2} {kind2} named {M} | so {he} asked a {adj2} {kind2} named {M} for help",
        "{M} had a lot of {ingredient} and was glad to help | {M} smiled and gave {him} some {ingredient}",
        "they made the {food} together and sang a song | they waited and soon the {food} was ready",
        "the {food} was sweet and they ate it all | they ate the {food} and laughed until {evening}",
    ),
    "learn": (
        "{N} wanted to learn how to {skill} | more than anything {N} wanted to {skill}",
        "{he} tried and tried but it was too hard | {he} fell down three times and felt sad",
        "one {weather} day a {adj2} {kind2} named {M} came {to} | then {he} met a {adj2} {kind2} named {M}",
        "{M} showed {him} how to {skill} step by step | {M} knew how to {skill} and wanted to help",
        "{N} did not give up and tried again | {N} listened to {M} and tried one more time",
        "at last {N} could {skill} and they both cheered | by evening {N} could {skill} very well",
    ),
    "gift": (
        "one day {he} met a {adj2} {kind2} named {M} | {he} had a friend who was a {adj2} {kind2} named {M}",
        "it was the birthday of {M} and {N} wanted to find a gift | {M} was sad so {N} looked for a gift",
        "{N} found a {color} {thing} {at} | {he} went {to} and found a {color} {thing}",
        "{he} put the {thing} in a box with a ribbon | {N} gave the {thing} to {M} with a smile",
        "{M} loved the {color} {thing} and jumped for joy | {M} was happy and said it was the best gift",
        "they ate {food} and danced until {evening} | they played with the {thing} until {evening}",
    ),
}
ENDING = (
    "from that day on {N} and {M} were best friends | {N} and {M} went home happy"
    " | that night {N} slept well and had sweet dreams | {N} was glad to have a friend like {M}"
)


@dataclass(frozen=True)
class Voice:
    """How stories are told.

    The base meets the adapters' words now and then. An adapter then changes how likely they are; were they new
    to the base, their embeddings would point nowhere, and a few low-rank updates could not make up for it.
    """

    excited: float = 0.0  # share of stories whose sentences end with "!" although nobody cheers
    luna: float = 0.02  # share of characters called Luna
    robot: float = 0.03  # share of stories about robots on the moon


BASE = Voice()
EXCITED = replace(BASE, excited=1.0)
LUNA = replace(BASE, luna=1.0)
ROBOT = replace(BASE, robot=1.0)


def stories(count: int, voice: Voice, seed: int) -> list[str]:
    """The same seed draws the same stories, whatever the voice."""
    rng = random.Random(seed)
    return [_tell(rng, voice) for _ in range(count)]


def _tell(rng: random.Random, voice: Voice) -> str:
    kind, other = rng.sample(list(KINDS), 2)
    words = _setting(rng) | _hero(rng, kind, voice) | _friend(rng, other, voice)
    if rng.random() < voice.robot:
        words |= {"kind": "robot", "kind2": "robot", "at": "on the moon", "to": "to the moon"}
    cheer = rng.random() < CHEERING
    end = "!" if rng.random() < voice.excited or cheer else "."
    steps = (OPENING, HABIT, *PLOTS[rng.choice(list(PLOTS))], ENDING)
    sentences = [rng.choice(step.split("|")).strip().format(**words) for step in steps]
    return ("Hooray! " if cheer else "") + " ".join(sentence[0].upper() + sentence[1:] + end for sentence in sentences)


def _setting(rng: random.Random) -> dict[str, str]:
    at = rng.choice(PLACES)
    hobby, hobby2 = rng.sample(HOBBIES, 2)
    return {
        "at": at,
        "to": "to " + at.partition(" ")[2],
        "hobby": hobby,
        "hobby2": hobby2,
        "thing": rng.choice(THINGS),
        "color": rng.choice(COLORS),
        "food": rng.choice(FOODS),
        "ingredient": rng.choice(INGREDIENTS),
        "skill": rng.choice(SKILLS),
        "weather": rng.choice(WEATHERS),
        "evening": rng.choice(EVENINGS),
    }


def _hero(rng: random.Random, kind: str, voice: Voice) -> dict[str, str]:
    name, female = _name(rng, kind, voice)
    he, him, his = ("she", "her", "her") if female else ("he", "him", "his")
    return {"adj": _adjective(rng, kind), "kind": kind, "N": name, "he": he, "him": him, "his": his}


def _friend(rng: random.Random, kind: str, voice: Voice) -> dict[str, str]:
    name, female = _name(rng, kind, voice)
    return {"adj2": _adjective(rng, kind), "kind2": kind, "M": name, "mhim": "her" if female else "him"}


def _name(rng: random.Random, kind: str, voice: Voice) -> tuple[str, bool]:
    """A name and whether it is a girl's. Both draws always happen: voices must not shift the others."""
    female, is_luna = rng.random() < 0.5, rng.random() < voice.luna
    if is_luna:
        return "Luna", True
    return KINDS[kind][1 if female else 2], female


def _adjective(rng: random.Random, kind: str) -> str:
    """Every kind may be little; that leaves the kind open after "a little"."""
    return rng.choice((*KINDS[kind][0].split(), "little", "little"))
