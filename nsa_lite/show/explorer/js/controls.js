// --- controls: sliders, what plays, the curve below the checkpoints ---

function element(tag, inside = "", attributes = {}) {
  const made = document.createElement(tag);
  made.textContent = inside;
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

function button(parent, words, title, clicked) {
  const made = element("button", words, { type: "button", title });
  made.addEventListener("click", clicked);
  parent.append(made);
  return made;
}

// A labelled range; its number stands beside it, in a span that no screen reader interrupts for.
function slider(parent, name, [low, high], changed, label = name) {
  const whole = element("label", "", { class: "nsa-slider" });
  const input = element("input", "", { type: "range", min: low, max: high, "aria-label": label });
  const words = element("span", "", { class: "nsa-value" });
  input.disabled = low === high;
  input.addEventListener("input", () => changed(Number(input.value)));
  whole.append(element("span", name), input, words);
  parent.append(whole);
  return {
    whole,
    input,
    words,
    show(value, said = value) {
      input.value = value;
      const only = low === high ? `${said}, the only one` : String(said);
      input.setAttribute("aria-valuetext", only);
      if (words.textContent !== only) words.textContent = only;
    },
  };
}

function legend(parent, skin, { two, missed, asks }) {
  const kinds = {
    forced: "forced",
    selected: "selected",
    window: "in the window",
    compressed: "compressed only",
    unused: "not selected",
    unseen: "not yet seen",
  };
  const marks = ["thick box: the query and its block", "yellow: block in focus"];
  if (asks) marks.push("ring, double line: the answer", "dotted box: asks");
  if (missed) marks.push("wavy line, thin column: missed");
  if (two) marks.push("bar on top: only in this pane");
  parent.replaceChildren(
    ...Object.entries(kinds).map(([kind, name]) => {
      const item = element("span");
      const swatch = element("canvas", "", { width: 20, height: 13, "aria-hidden": "true" });
      const sheet = new CanvasSheet(swatch.getContext("2d"), skin, 20, 13);
      sheet.box(kind, 0.5, 0.5, 19, 12);
      item.append(swatch, ` ${name}`);
      return item;
    }),
    ...marks.map((mark) => element("span", mark)),
  );
}

// Answers found at each checkpoint, as a line below their slider; a dot at the one shown.
function drawCurve(canvas, trace, place, skin) {
  const { checkpoints } = trace.facts;
  const counts = checkpoints.map((_, checkpoint) => trace.found({ ...place, checkpoint }));
  const sheet = CanvasSheet.on(canvas, skin);
  const inset = 8; // as far as the slider's knob stands from its end
  const x = (k) => inset + (k * (sheet.width - 2 * inset)) / (checkpoints.length - 1);
  const y = (count) => sheet.height - 3 - (count / trace.asked.length) * (sheet.height - 6);
  sheet.line(0, y(0), sheet.width, y(0), skin.faint, 1);
  sheet.line(0, y(trace.asked.length), sheet.width, y(trace.asked.length), skin.faint, 1);
  counts.slice(1).forEach((count, k) => {
    sheet.line(x(k), y(counts[k]), x(k + 1), y(count), skin.selected[0], 1.5);
  });
  sheet.ring(x(place.checkpoint), y(counts[place.checkpoint]), 3);
  const each = counts.map((count, k) => `${checkpoints[k]} ${count}`).join(", ");
  canvas.setAttribute("aria-label", `answers' blocks selected, of ${trace.asked.length}: ${each}`);
}

// What plays: the queries, or training. `step` moves on and says whether there is more.
class Player {
  constructor(parent, trace, explorer) {
    Object.assign(this, { trace, explorer, timer: null });
    this.button = button(parent, "Play", "walk through the queries or the checkpoints", () =>
      this.set(!this.timer),
    );
    if (trace.facts.checkpoints.length === 1) return;
    this.what = element("select", "", { "aria-label": "what plays" });
    this.what.append(element("option", "queries"), element("option", "checkpoints"));
    this.what.addEventListener("change", () => this.set(false));
    parent.append(this.what);
  }

  name() {
    return this.what?.value === "checkpoints" ? "checkpoint" : "query";
  }

  step() {
    const { explorer, trace } = this;
    const [, high] = trace.facts.ranges[this.name()];
    const now = explorer.view[this.name()];
    if (now >= high) return this.set(false);
    if (this.name() === "checkpoint") return explorer.choose("checkpoint", now + 1);
    const further = Math.ceil(trace.facts.queries / 256);
    const q = Math.min(trace.facts.queries - 1, trace.places[now] + further);
    explorer.choose("query", trace.positions[q]);
  }

  set(on) {
    const [low, high] = this.trace.facts.ranges[this.name()];
    if (on && this.explorer.view[this.name()] >= high) this.explorer.choose(this.name(), low);
    const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
    const pace = this.name() === "checkpoint" || calm ? 900 : 120;
    clearInterval(this.timer);
    this.button.textContent = on ? "Pause" : "Play";
    this.timer = on ? setInterval(() => this.step(), pace) : null;
  }
}

const HELP = [
  [
    "On the map and in the text",
    [
      ["arrows", "the query before, the next; in the text up and down go by lines"],
      ["Page Up, Page Down, Home, End", "further"],
      ["q, Shift+q", "the next question, the one before"],
      ["+, \u2212, Escape", "on the map: zoom in, out, back to the whole"],
    ],
  ],
  [
    "On the strip",
    [
      ["arrows, Home, End", "move the block in focus"],
      [", and .", "the selected block before, the next"],
      ["+, \u2212", "zoom"],
    ],
  ],
  [
    "Mouse",
    [
      ["hover", "a preview of another query, in the text and on the map"],
      ["click", "choose it; Shift+click in the text: look at its block"],
      ["drag", "on the map: zoom to a rectangle; along its left edge or the black line: scrub"],
      ["double click", "on the map: back to the whole"],
    ],
  ],
  [
    "Anywhere in the explorer",
    [
      ["?", "this help"],
      ["/", "find in the text; Enter: next"],
    ],
  ],
];

function helpPanel(parent) {
  for (const [where, keys] of HELP) {
    const rows = element("dl");
    for (const [key, does] of keys) rows.append(element("dt", key), element("dd", does));
    parent.append(element("h4", where), rows);
  }
}
