"""What a person sees, read back from the pixels of the explorer's canvases."""

import torch

from nsa_lite.show import plots
from nsa_lite.show.explorer.sequence import TracedSequence

KINDS = ("masked", "unused", "selected", "forced")
MARGINS = (48, 36, 8, 8)  # of the block map: left, top, right, bottom
GROUNDS = {"masked": "#FFFFFF", "unused": "#F2F2F2", "selected": "#0072B2", "forced": "#E69F00"}

# The kind whose ground colour fills most of a rectangle (in CSS pixels) of a canvas.
READ = """(canvas, [boxes, grounds]) => {
  const scale = window.devicePixelRatio, context = canvas.getContext("2d");
  const near = (pixels, at, [r, g, b]) =>
    Math.abs(pixels[at] - r) + Math.abs(pixels[at + 1] - g) + Math.abs(pixels[at + 2] - b) < 12;
  return boxes.map(([x, y, width, height]) => {
    const size = [width, height].map((side) => Math.max(1, Math.floor(side * scale)));
    const pixels = context.getImageData(Math.round(x * scale), Math.round(y * scale), ...size).data;
    const counts = grounds.map((ground) => {
      let count = 0;
      for (let at = 0; at < pixels.length; at += 4) count += near(pixels, at, ground);
      return count;
    });
    return counts.indexOf(Math.max(...counts));
  });
}"""


def kinds_at(canvas, boxes: list[tuple[float, float, float, float]]) -> list[str]:
    """What fills each box of a canvas, by its colour."""
    rgb = [[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in GROUNDS.values()]
    return [KINDS[i] for i in canvas.evaluate(READ, [boxes, rgb])]


def map_kinds(page, sequence: TracedSequence, t: int) -> list[str]:
    """The row of query t on the block map, one kind a block."""
    canvas = page.locator(".nsa-map")
    size = canvas.evaluate("canvas => [canvas.clientWidth, canvas.clientHeight]")
    left, top, right, bottom = MARGINS
    wide = (size[0] - left - right) / sequence.blocks
    tall = (size[1] - top - bottom) / sequence.queries
    y = top + (t - sequence.start) * tall
    return kinds_at(
        canvas,
        [
            (left + j * wide + 1, y + 0.2 * tall, wide - 2, max(1, 0.6 * tall))
            for j in range(sequence.blocks)
        ],
    )


def strip_kinds(page, sequence: TracedSequence) -> list[str]:
    """The row of blocks on the strip, unzoomed; the lower part, which no ring or line covers."""
    canvas = page.locator(".nsa-strip")
    wide = canvas.evaluate("canvas => canvas.clientWidth") / sequence.length
    size = sequence.config.select_block_size
    boxes = []
    for j in range(sequence.blocks):
        tokens = min(size, sequence.length - j * size)
        boxes.append((j * size * wide + 2, 172, tokens * wide - 4, 4))
    return kinds_at(canvas, boxes)


def true_kinds(sequence: TracedSequence, ids: torch.Tensor, t: int) -> list[str]:
    """What each block is to query t, by the ids (n,) of a trace."""
    kinds = plots.block_kinds(sequence.config, ids.view(1, 1, 1, -1), t)[0, 0, 0].tolist()
    return kinds + ["masked"] * (sequence.blocks - len(kinds))
