// --- sheets: what drawings are drawn on, a canvas or the text of an SVG ---

const FONT = "12px system-ui, sans-serif";

function canvasOf(image) {
  const canvas = new OffscreenCanvas(image.width, image.height);
  canvas.getContext("2d").putImageData(image, 0, 0);
  return canvas;
}

let ruler;
function widthOf(words, font = FONT) {
  ruler ??= new OffscreenCanvas(1, 1).getContext("2d");
  ruler.font = font;
  return ruler.measureText(words).width;
}

// The first of some wordings that fits into `room` pixels, or as much of the last one as does.
function fitting(wordings, room) {
  const fits = wordings.find((words) => widthOf(words) <= room);
  if (fits !== undefined) return fits;
  let words = wordings.at(-1);
  while (words.length > 1 && widthOf(`${words}\u2026`) > room) words = words.slice(0, -1);
  return widthOf(`${words}\u2026`) <= room ? `${words}\u2026` : "";
}

class CanvasSheet {
  constructor(ctx, skin, width, height, scale = 1) {
    Object.assign(this, { ctx, skin, width, height, scale });
    ctx.font = FONT;
    ctx.textBaseline = "middle";
  }

  // A canvas at its place on the page, in the screen's own pixels, cleared.
  static on(canvas, skin) {
    const scale = window.devicePixelRatio || 1;
    const width = Math.max(1, canvas.clientWidth);
    const height = Math.max(1, canvas.clientHeight);
    return CanvasSheet.sized(canvas, skin, width, height, scale);
  }

  static sized(canvas, skin, width, height, scale) {
    const [across, down] = [width, height].map((side) => Math.round(side * scale));
    if (canvas.width !== across) canvas.width = across; // setting it anew would be slow
    if (canvas.height !== down) canvas.height = down;
    const ctx = canvas.getContext("2d");
    ctx.setTransform(scale, 0, 0, scale, 0, 0);
    const sheet = new CanvasSheet(ctx, skin, width, height, scale);
    sheet.rect(0, 0, width, height, skin.paper);
    return sheet;
  }

  part(x, y, width, height, draw) {
    // a drawing of its own at a place on this sheet
    this.ctx.save();
    this.ctx.translate(x, y);
    this.ctx.beginPath();
    this.ctx.rect(0, 0, width, height);
    this.ctx.clip();
    draw(new CanvasSheet(this.ctx, this.skin, width, height, this.scale));
    this.ctx.restore();
  }

  rect(x, y, width, height, colour) {
    this.ctx.fillStyle = colour;
    this.ctx.fillRect(x, y, width, height);
  }

  box(kind, x, y, width, height) {
    this.rect(x, y, width, height, this.pattern(kind));
    if (width > 3 && height > 3) this.outline(x, y, width, height, this.skin.line, 0.5);
  }

  pattern(kind) {
    const { ctx, skin } = this;
    ctx.canvas.patterns ??= {};
    const key = `${skin === DARK} ${kind}`;
    const image = () => new ImageData(new Uint8ClampedArray(tileOf(skin, kind).buffer), 8, 8);
    return (ctx.canvas.patterns[key] ??= ctx.createPattern(canvasOf(image()), "repeat"));
  }

  outline(x, y, width, height, colour, thick) {
    this.ctx.strokeStyle = colour;
    this.ctx.lineWidth = thick;
    this.ctx.strokeRect(x, y, width, height);
  }

  line(x0, y0, x1, y1, colour, thick, dash = []) {
    const { ctx } = this;
    ctx.setLineDash(dash);
    ctx.strokeStyle = colour;
    ctx.lineWidth = thick;
    ctx.beginPath();
    ctx.moveTo(x0, y0);
    ctx.lineTo(x1, y1);
    ctx.stroke();
    ctx.setLineDash([]);
  }

  ring(x, y, radius) {
    const { ctx } = this;
    ctx.beginPath();
    ctx.arc(x, y, radius, 0, 2 * Math.PI);
    ctx.fillStyle = "#FFFFFF";
    ctx.fill();
    ctx.strokeStyle = "#000000";
    ctx.lineWidth = 1.2;
    ctx.stroke();
  }

  text(words, x, y, align = "left", colour = this.skin.ink) {
    this.ctx.fillStyle = colour;
    this.ctx.textAlign = align;
    this.ctx.fillText(words, x, y);
  }

  image(canvas, x, y, width, height) {
    this.ctx.drawImage(canvas, x, y, width, height);
  }
}

const escaped = (words) =>
  String(words)
    .replace(/[&<>"]/g, (sign) => `&#${sign.charCodeAt(0)};`)
    .replace(/[\u0000-\u0008\u000B\u000C\u000E-\u001F]/g, "");
const short = (number) => Number(number.toFixed(2));

class SvgSheet {
  constructor(skin, width, height, parts = [], scale = 2) {
    Object.assign(this, { skin, width, height, parts, scale });
  }

  part(x, y, width, height, draw) {
    this.parts.push(
      `<svg x="${short(x)}" y="${short(y)}" width="${short(width)}" ` +
        `height="${short(height)}">`,
    );
    draw(new SvgSheet(this.skin, width, height, this.parts));
    this.parts.push("</svg>");
  }

  rect(x, y, width, height, colour, more = "") {
    this.parts.push(
      `<rect x="${short(x)}" y="${short(y)}" width="${short(Math.max(0, width))}" ` +
        `height="${short(Math.max(0, height))}" fill="${colour}"${more}/>`,
    );
  }

  box(kind, x, y, width, height) {
    const edge = width > 3 && height > 3 ? ` stroke="${this.skin.line}" stroke-width="0.5"` : "";
    this.rect(x, y, width, height, `url(#nsa-${kind})`, edge);
  }

  outline(x, y, width, height, colour, thick) {
    this.rect(x, y, width, height, "none", ` stroke="${colour}" stroke-width="${thick}"`);
  }

  line(x0, y0, x1, y1, colour, thick, dash = []) {
    const [a, b, c, d] = [x0, y0, x1, y1].map(short);
    this.parts.push(
      `<path d="M${a} ${b}L${c} ${d}" stroke="${colour}" ` +
        `stroke-width="${thick}" stroke-dasharray="${dash.join(" ")}"/>`,
    );
  }

  ring(x, y, radius) {
    this.parts.push(
      `<circle cx="${short(x)}" cy="${short(y)}" r="${radius}" fill="#FFFFFF" ` +
        'stroke="#000000" stroke-width="1.2"/>',
    );
  }

  text(words, x, y, align = "left", colour = this.skin.ink) {
    const anchor = { left: "start", center: "middle", right: "end" }[align];
    this.parts.push(
      `<text x="${short(x)}" y="${short(y)}" fill="${colour}" ` +
        `text-anchor="${anchor}" dominant-baseline="central">${escaped(words)}</text>`,
    );
  }

  image(source, x, y, width, height) {
    const canvas = document.createElement("canvas");
    [canvas.width, canvas.height] = [source.width, source.height];
    canvas.getContext("2d").drawImage(source, 0, 0);
    this.parts.push(
      `<image x="${short(x)}" y="${short(y)}" width="${short(width)}" ` +
        `height="${short(height)}" preserveAspectRatio="none" href="${canvas.toDataURL()}"/>`,
    );
  }

  toString() {
    const { width, height, skin } = this;
    const kinds = ["unseen", "unused", "selected", "forced", "window", "compressed"];
    return (
      `<svg width="${width}" height="${height}" ` +
      `viewBox="0 0 ${width} ${height}" font-family="system-ui, sans-serif" font-size="12">` +
      `<defs>${kinds.map((kind) => this.tile(kind)).join("")}</defs>` +
      `<rect width="${width}" height="${height}" fill="${skin.paper}"/>${this.parts.join("")}</svg>`
    );
  }

  tile(kind) {
    const [ground, mark, marked] = this.skin[kind];
    const at = Array.from({ length: 64 }, (_, k) => [k & 7, k >> 3]);
    const dots = at.filter(([x, y]) => marked?.(x, y)).map(([x, y]) => `M${x} ${y}h1v1h-1z`);
    return (
      `<pattern id="nsa-${kind}" width="8" height="8" patternUnits="userSpaceOnUse">` +
      `<rect width="8" height="8" fill="${ground}"/>` +
      `<path d="${dots.join("")}" fill="${mark}"/></pattern>`
    );
  }
}
