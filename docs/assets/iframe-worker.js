// Browsers start no worker from a file, so the search runs in a frame where the site is opened from a disk.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      const frame = document.createElement("iframe");
      frame.hidden = true;
      frame.srcdoc = "<!doctype html>";
      this.frame = frame;
      this.ready = new Promise((done, failed) => {
        frame.addEventListener("load", () => {
          const inside = frame.contentWindow;
          const load = (address) => new Promise((loaded, missing) => {
            const script = inside.document.createElement("script");
            Object.assign(script, { src: address, onload: loaded, onerror: missing });
            inside.document.body.append(script);
          });
          inside.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }));
          inside.importScripts = (...urls) => Promise.all(urls.map(load));
          load(url).then(done, failed);
        }, { once: true });
      });
      document.documentElement.append(frame);
    }
    postMessage(data) {
      this.ready.then(() => {
        const inside = this.frame.contentWindow;
        inside.dispatchEvent(new inside.MessageEvent("message", { data }));
      });
    }
    terminate() {
      this.frame.remove();
    }
  };
}
