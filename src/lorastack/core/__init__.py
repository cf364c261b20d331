"""The algebra of adapters: no file, no framework. Read in this order: delta, factor, adapter, packed, stack."""
