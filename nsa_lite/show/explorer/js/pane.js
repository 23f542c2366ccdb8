// --- a pane: the text, the map, the strip and the words of one place ---

const PANE = `
  <div class="nsa-title"></div>
  <p class="nsa-said"><b class="nsa-preview">preview</b> <bdi class="nsa-named"></bdi>
    <span class="nsa-sentence"></span></p>
  <div class="nsa-views">
    <div class="nsa-text" tabindex="0" role="listbox"
      aria-label="Tokens: which query is looked at"></div>
    <canvas class="nsa-map" tabindex="0" role="slider" aria-orientation="vertical"
      aria-label="Block map: which query is looked at"></canvas>
    <canvas class="nsa-strip" tabindex="0" role="slider"
      aria-label="Sequence as a strip: which block is in focus"></canvas>
    <div class="nsa-side">
      <p class="nsa-facts"></p>
      <canvas class="nsa-gates" role="img"
        aria-label="Gates of each head; the sentence gives their means"></canvas>
      <ul class="nsa-remarks"></ul>
    </div>
  </div>`;

let panes = 0; // so that each has ids of its own on the page

class Pane {
  constructor(parent, explorer) {
    const { trace } = explorer;
    this.root = element("section", "", { class: "nsa-pane" });
    this.root.innerHTML = PANE;
    Object.assign(this, { explorer, trace, baked: {}, longest: 0 });
    for (const name of [
      "title",
      "said",
      "preview",
      "named",
      "sentence",
      "text",
      "map",
      "strip",
      "facts",
      "gates",
      "remarks",
    ])
      this[name] = this.root.querySelector(`.nsa-${name}`);
    this.text.id = `nsa-text-${(panes += 1)}`;
    for (const part of this.root.querySelectorAll("[tabindex]")) {
      part.setAttribute("data-lm-suppress-shortcuts", "true"); // JupyterLab leaves its keys to it
    }
    parent.append(this.root);
    this.panel = new TextPanel(this.text, trace, {
      hover: (s) => explorer.preview(s),
      choose: (s) =>
        trace.isQuery(s) ? explorer.choose("query", s) : explorer.lookAt(trace.blockOf[s]),
      focus: (s) => explorer.lookAt(trace.blockOf[s]),
    });
    this.map.addEventListener("keydown", (event) => explorer.key(event, mapKeys(explorer, 1)));
    this.text.addEventListener("keydown", (event) => explorer.key(event, this.textKeys()));
    this.strip.addEventListener("keydown", (event) => explorer.key(event, stripKeys(explorer)));
    this.strip.addEventListener("click", (event) => {
      const { first, count } = stretch(trace, explorer.view, this.strip.clientWidth);
      const token = first + (event.offsetX / this.strip.clientWidth) * count;
      explorer.lookAt(trace.blockOf[clamp(Math.floor(token), 0, trace.length - 1)]);
    });
    new MapMouse(this);
  }

  textKeys() {
    // up and down go by lines of the text
    const { panel, trace, explorer } = this;
    const { query } = explorer.view;
    const line = panel.lineOf(query);
    const to = (other) => () => {
      const at = clamp(other, 0, panel.starts.length - 1);
      const end = (panel.starts[at + 1] ?? trace.length) - 1;
      explorer.choose(
        "query",
        trace.snap(Math.min(end, panel.starts[at] + query - panel.starts[line])),
      );
    };
    const page = Math.max(1, Math.floor(this.text.clientHeight / LINE_HEIGHT) - 1);
    return {
      ...mapKeys(explorer),
      ArrowUp: to(line - 1),
      ArrowDown: to(line + 1),
      PageUp: to(line - page),
      PageDown: to(line + page),
    };
  }

  // Canvases first, then words: whoever asks for a size after a change waits for the layout.
  paint(place, view, t, other) {
    const {
      trace,
      explorer: { skin },
    } = this;
    const now = trace.at(place, t);
    const beside = other && trace.at(other, t);
    drawMap(CanvasSheet.on(this.map, skin), trace, place, { ...view, t }, this.baked);
    drawStrip(CanvasSheet.on(this.strip, skin), trace, now, beside, view);
    drawGates(CanvasSheet.on(this.gates, skin), trace, now);
    return { place, view, now, beside };
  }

  write({ place, view, now, beside }) {
    this.panel.draw(now, view, beside);
    this.say(place, view, now);
  }

  // The sentence's lines never get fewer: what is below must not move under the mouse.
  keepRoom() {
    const { length } = this.sentence.textContent;
    if (length <= this.longest) return;
    this.longest = length;
    this.said.style.minHeight = `${this.said.offsetHeight}px`;
  }

  forgetRoom() {
    // for another width
    this.longest = 0;
    this.said.style.minHeight = "";
  }

  say(place, view, now) {
    const { trace } = this;
    const { panes: shown } = this.explorer;
    if (this === shown[0])
      this.title.textContent = shown[1] ? `first: ${placeWords(trace, place)}` : "";
    this.preview.classList.toggle("nsa-quiet", now.t === view.query); // it keeps its room
    this.named.textContent = trace.tokens[now.t] ? `\u201C${trace.tokens[now.t]}\u201D` : "";
    this.named.hidden = !trace.tokens[now.t];
    this.sentence.textContent = sentence(trace, place, now);
    this.keepRoom();
    this.remarks.replaceChildren(...remarks(trace, place, now).map((line) => element("li", line)));
    this.facts.textContent = blockFacts(trace, now, view.focus);
    const chosen =
      now.t === view.query ? this.sentence.textContent : trace.describe(place, view.query);
    aria(this.map, trace.facts.ranges.query, view.query, chosen);
    const focus = `${this.facts.textContent}: ${blockTokens(trace, view.focus).join(gap(trace))}`;
    aria(this.strip, [0, trace.facts.blocks - 1], view.focus, focus);
  }
}

function aria(canvas, [low, high], now, words) {
  const values = { valuemin: low, valuemax: high, valuenow: now, valuetext: words };
  for (const [name, value] of Object.entries(values)) canvas.setAttribute(`aria-${name}`, value);
}

// --- the mouse on the map: hover, choose, scrub, zoom to a rectangle ---

class MapMouse {
  constructor({ map, trace, explorer }) {
    Object.assign(this, { map, trace, explorer, down: null });
    const on = (name, act) => map.addEventListener(name, (event) => act.call(this, event));
    on("pointermove", this.move);
    on("pointerdown", this.press);
    on("pointerup", this.release);
    on("pointercancel", () => {
      this.down = null;
    });
    on("pointerleave", () => this.down || explorer.look({ hovered: null }));
    on("dblclick", () => explorer.look({ area: null }));
  }

  place() {
    return mapPlace(
      this.trace,
      this.explorer.view.area,
      this.map.clientWidth,
      this.map.clientHeight,
    );
  }

  query({ offsetY }) {
    return this.trace.positions[this.place().query(offsetY)];
  }

  press(event) {
    if (event.button) return;
    const place = this.place();
    const line = place.y(this.trace.places[this.explorer.view.query]);
    const scrubs = event.offsetX < MAP.left || Math.abs(event.offsetY - line) < 5;
    this.down = { x: event.offsetX, y: event.offsetY, scrubs, moved: false };
    this.map.setPointerCapture(event.pointerId);
  }

  move(event) {
    const { down, explorer } = this;
    if (!down) return explorer.look({ hovered: this.query(event) });
    down.moved ||= Math.hypot(event.offsetX - down.x, event.offsetY - down.y) > 5;
    if (!down.moved) return;
    if (down.scrubs) return explorer.choose("query", this.query(event));
    const [x, y] = [Math.min(down.x, event.offsetX), Math.min(down.y, event.offsetY)];
    const brush = {
      x,
      y,
      width: Math.abs(event.offsetX - down.x),
      height: Math.abs(event.offsetY - down.y),
    };
    explorer.look({ brush, hovered: null });
  }

  release(event) {
    const { down, explorer, trace } = this;
    this.down = null;
    if (!down) return;
    const { brush } = explorer.view;
    const place = this.place();
    if (brush) {
      const queries = [place.query(brush.y), place.query(brush.y + brush.height) + 1];
      const blocks = [place.block(brush.x), place.block(brush.x + brush.width) + 1];
      return explorer.look({ brush: null, area: { queries, blocks } });
    }
    if (down.moved) return;
    const t = trace.positions[place.query(event.offsetY)];
    if (event.offsetX >= MAP.left) explorer.lookAt(place.block(event.offsetX));
    explorer.choose("query", t);
  }
}
