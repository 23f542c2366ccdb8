// --- the address: what is looked at, so that a link leads to it; on a page of its own only ---

// Whole numbers in their ranges; whatever else an address says is passed over.
function fromAddress(hash, trace) {
  const said = new URLSearchParams(hash.replace(/^#/, ""));
  const { ranges, blocks } = trace.facts;
  const whole = (words, [low, high]) => {
    const value = /^\d{1,9}$/.test(words ?? "") ? Number(words) : -1;
    return value >= low && value <= high ? value : undefined;
  };
  const read = {};
  for (const name of CHOICES) read[name] = whole(said.get(name), ranges[name]);
  if (read.query !== undefined && !trace.isQuery(read.query)) read.query = undefined;
  const beside = (said.get("beside") ?? "").split(".");
  const [checkpoint, layer, group] = ["checkpoint", "layer", "group"].map((name, k) =>
    whole(beside[k], ranges[name]),
  );
  const all =
    beside.length === 3 && [checkpoint, layer, group].every((value) => value !== undefined);
  read.beside = all ? { checkpoint, layer, group } : undefined;
  read.focus = whole(said.get("focus"), [0, blocks - 1]);
  return Object.fromEntries(Object.entries(read).filter(([, value]) => value !== undefined));
}

function toAddress({ beside, focus, ...view }) {
  const parts = CHOICES.map((name) => `${name}=${view[name]}`);
  parts.push(`focus=${focus}`);
  if (beside) parts.push(`beside=${beside.checkpoint}.${beside.layer}.${beside.group}`);
  return `#${parts.join("&")}`;
}

class Address {
  constructor(explorer) {
    this.explorer = explorer;
    this.go(location.hash);
    addEventListener("hashchange", () => this.go(location.hash));
    explorer.drawn = () => {
      clearTimeout(this.timer);
      this.timer = setTimeout(() => this.write(), 250); // browsers limit how often it may change
    };
  }

  go(hash) {
    const { focus, ...choices } = fromAddress(hash, this.explorer.trace);
    for (const [name, value] of Object.entries(choices)) this.explorer.set(name, value);
    if (focus !== undefined) this.explorer.lookAt(focus);
  }

  write() {
    const hash = toAddress(this.explorer.view);
    try {
      if (hash !== location.hash) history.replaceState(null, "", hash);
    } catch {
      // a frame without an address of its own
      this.write = () => {};
    }
  }
}
