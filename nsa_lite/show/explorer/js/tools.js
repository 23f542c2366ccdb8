// --- tools: the next question, search, two panes, pictures, help ---

class Tools {
  constructor(root, explorer) {
    Object.assign(this, { explorer, trace: explorer.trace, found: [], at: -1 });
    const parent = root.querySelector(".nsa-tools");
    this.help = root.querySelector(".nsa-help");
    helpPanel(this.help);
    if (this.trace.asked.length) {
      button(parent, "Next question", "the next query that asks (q)", () => ask(explorer, 1));
    }
    this.box = element("input", "", {
      type: "search",
      "aria-label": "find in the text",
      placeholder: "find in the text",
    });
    this.count = element("span", "", { class: "nsa-count" });
    this.box.addEventListener("input", () => this.find(this.box.value));
    this.box.addEventListener("keydown", (event) => {
      event.stopPropagation();
      if (event.key === "Enter") this.go(event.shiftKey ? -1 : 1);
    });
    parent.append(this.box, this.count);
    const beside = "a second checkpoint, layer or group beside this one";
    this.twice = button(parent, "Two panes", beside, () => togglePane(explorer));
    button(parent, "PNG", "save what is shown as a PNG", async () =>
      save(await pngOf(explorer), "selection.png"),
    );
    button(parent, "SVG", "save what is shown as an SVG", () =>
      save(svgOf(explorer), "selection.svg"),
    );
    this.helper = button(parent, "?", "keys and mouse", () => this.showHelp());
    this.helper.setAttribute("aria-expanded", "false");
  }

  find(words) {
    this.found = findAll(this.trace, words);
    this.at = -1;
    if (this.found.length) this.go(1);
    else this.showHits();
  }

  go(step) {
    // on to another place where the words stand
    if (!this.found.length) return;
    this.at = (this.at + step + this.found.length) % this.found.length;
    const [first] = this.found[this.at];
    this.explorer.lookAt(this.trace.blockOf[first], first);
    this.showHits();
  }

  showHits() {
    const none = this.box.value.trim() ? "not found" : "";
    this.count.textContent = this.found.length ? `${this.at + 1} of ${this.found.length}` : none;
    const hits = this.found.map(([first, end], k) => [first, end, k === this.at]);
    for (const { panel } of this.explorer.panes) panel.hits = hits;
    this.explorer.redraw();
  }

  showHelp() {
    this.help.hidden = !this.help.hidden;
    this.helper.setAttribute("aria-expanded", String(!this.help.hidden));
  }
}

function togglePane(explorer) {
  // a second pane: another checkpoint, or the next group or layer
  const {
    view,
    trace: {
      facts: { ranges },
    },
  } = explorer;
  if (view.beside) return explorer.set("beside", null);
  const beside = { checkpoint: view.checkpoint, layer: view.layer, group: view.group };
  const name = ["checkpoint", "group", "layer"].find((each) => ranges[each][1] > 0) ?? "checkpoint";
  beside[name] = view[name] > 0 ? 0 : ranges[name][1];
  return explorer.set("beside", beside);
}

function ask(explorer, step) {
  // the next query that asks, round and round
  const asked = explorer.trace.asked.map(({ t }) => t);
  if (!asked.length) return;
  const at = upTo(asked, explorer.view.query); // so many do not come later
  const here = asked[at - 1] === explorer.view.query;
  const next = step > 0 ? at : at - (here ? 2 : 1);
  const t = asked[(next + asked.length) % asked.length];
  explorer.choose("query", t);
}

// --- what each key does ---

function mapKeys(explorer, zooms) {
  const { view, trace } = explorer;
  const q = trace.places[view.query];
  const last = trace.facts.queries - 1;
  const page = Math.ceil(last / 10);
  const to = (at) => () => explorer.choose("query", trace.positions[clamp(at, 0, last)]);
  const zoom = (factor) => () => zoomMap(explorer, factor);
  return {
    ArrowDown: to(q + 1),
    ArrowRight: to(q + 1),
    ArrowUp: to(q - 1),
    ArrowLeft: to(q - 1),
    PageDown: to(q + page),
    PageUp: to(q - page),
    Home: to(0),
    End: to(last),
    ...questionKeys(explorer),
    Escape: () => explorer.look({ area: null }),
    ...(zooms && { "+": zoom(0.5), "=": zoom(0.5), "-": zoom(2) }),
  };
}

const questionKeys = (explorer) => ({ q: () => ask(explorer, 1), Q: () => ask(explorer, -1) });

function zoomMap(explorer, factor) {
  // about the query and the block in focus
  const {
    trace: {
      facts: { queries, blocks },
      places,
    },
    view,
  } = explorer;
  const area = view.area ?? { queries: [0, queries], blocks: [0, blocks] };
  const about = (middle, [low, high], count, least) => {
    const wide = clamp(Math.round((high - low) * factor), Math.min(least, count), count);
    const first = clamp(Math.round(middle - wide / 2), 0, count - wide);
    return [first, first + wide];
  };
  const rows = about(places[view.query], area.queries, queries, 8);
  const columns = about(view.focus, area.blocks, blocks, 4);
  const whole = rows[1] - rows[0] === queries && columns[1] - columns[0] === blocks;
  explorer.look({ area: whole ? null : { queries: rows, blocks: columns } });
}

function stripKeys(explorer) {
  const { focus, zoom, query } = explorer.view;
  const chosen = explorer.trace.at(explorer.placeOf(0), query).taken.slice().sort();
  const to = (j) => () => explorer.lookAt(j);
  const wider = (percent) => () => explorer.look({ zoom: zoom + percent });
  return {
    ArrowRight: to(focus + 1),
    ArrowLeft: to(focus - 1),
    Home: to(0),
    End: to(Infinity),
    ".": to(chosen.find((j) => j > focus) ?? focus),
    ",": to(chosen.findLast((j) => j < focus) ?? focus),
    "+": wider(10),
    "=": wider(10),
    "-": wider(-10),
    ...questionKeys(explorer),
  };
}
