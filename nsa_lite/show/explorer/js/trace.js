// --- the trace: numbers out of the bytes, and what a drawing asks of them ---

const TYPES = { uint8: Uint8Array, int32: Int32Array, float32: Float32Array };
const NOT_SENT = -1; // in place of a score that only Python has

async function openTrace(facts, bytes) {
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  const buffer = await new Response(stream).arrayBuffer();
  const arrays = {};
  for (const [name, place] of Object.entries(facts.arrays)) arrays[name] = arrayAt(buffer, place);
  return new Trace(facts, arrays);
}

function arrayAt(buffer, { type, shape, begins }) {
  const count = shape.reduce((a, b) => a * b, 1);
  if (type === "uint16") return joinBytes(new Uint8Array(buffer, begins, 2 * count));
  return new TYPES[type](buffer, begins, count);
}

function joinBytes(bytes) {
  // all low bytes, then all high ones
  const joined = new Uint16Array(bytes.length / 2);
  const high = bytes.subarray(joined.length);
  for (let k = 0; k < joined.length; k++) joined[k] = bytes[k] | (high[k] << 8);
  return joined;
}

// The level before each row's first one: scores were sent as steps down, from row to row.
function levelsBefore(steps, ranks) {
  const before = new Uint16Array(steps.length / ranks);
  let level = 0;
  for (let row = 0, at = 0; row < before.length; row++) {
    before[row] = level;
    for (const end = at + ranks; at < end; at++) level = (level - steps[at]) & 0xffff;
  }
  return before;
}

// A place is one value of checkpoint, layer, group and n.
class Trace {
  constructor(facts, arrays) {
    const { length, ranks, select_block_size: size } = facts;
    Object.assign(this, { facts, arrays, length, ranks, size, positions: arrays.positions });
    this.before = levelsBefore(arrays.steps, ranks);
    [, this.layers, this.groups, this.heads] = facts.arrays.gates.shape; // heads of a group
    [this.parts, , this.compressed] = facts.arrays.p?.shape.slice(-3) ?? [0, 0, 0];
    this.places = new Int32Array(length).fill(-1); // of each position among the traced queries
    this.positions.forEach((t, q) => {
      this.places[t] = q;
    });
    this.blockOf = new Int32Array(length);
    for (let j = 0; j < facts.blocks; j++) this.blockOf.fill(j, j * size, (j + 1) * size);
    this.tokens = facts.tokens.map(visible);
    this.longest = Math.max(1, ...new Set(this.tokens.map((token) => token.length)));
    this.asked = [];
    arrays.answer_block.forEach((block, q) => {
      if (block >= 0) this.asked.push({ q, t: this.positions[q], block, at: arrays.answer_at[q] });
    });
  }

  byScore(place) {
    return this.facts.by_score[place.checkpoint][place.layer];
  }
  own(t) {
    return this.blockOf[t];
  }
  isQuery(t) {
    return this.places[t] >= 0;
  }

  snap(t) {
    // the traced query that is nearest
    const { positions } = this;
    let low = 0;
    let high = positions.length - 1;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (positions[middle] < t) low = middle + 1;
      else high = middle;
    }
    return low && t - positions[low - 1] < positions[low] - t ? positions[low - 1] : positions[low];
  }

  rowOf(place, q) {
    const group = (place.checkpoint * this.layers + place.layer) * this.groups + place.group;
    return group * this.facts.queries + q;
  }

  countAt(place, q) {
    // how many blocks the query of place q selects
    const wanted = this.byScore(place) ? place.n : this.arrays.taken[this.rowOf(place, q)];
    return Math.min(wanted, this.arrays.begun[q], this.ranks);
  }

  takenAt(place, q) {
    // these blocks, the forced ones in front
    const from = this.rowOf(place, q) * this.ranks;
    return this.arrays.order.subarray(from, from + this.countAt(place, q));
  }

  at(place, t) {
    // one query, as the layer and group that are looked at treat it
    const { arrays, ranks } = this;
    const q = this.places[t];
    const row = this.rowOf(place, q);
    const begun = arrays.begun[q]; // blocks, the last of them the query's own
    const ranked = arrays.order.subarray(row * ranks, row * ranks + Math.min(begun, ranks));
    const now = {
      t,
      q,
      row,
      begun,
      ranked,
      byScore: this.byScore(place),
      taken: this.takenAt(place, q),
      forced: arrays.forced[row], // so many of them
      scores: this.scoresById(row, ranked, begun), // Eq. 9 and 10
      seen: arrays.seen[q], // compressed blocks
      summarised: arrays.summarised[q], // tokens that these cover
      windowFirst: arrays.window_first[q],
      answer: arrays.answer_block[q], // the block that holds it, or -1
      answerAt: arrays.answer_at[q],
    };
    now.kinds = this.kinds(now);
    now.missed = this.missed(now);
    return now;
  }

  scoresById(row, ranked, begun) {
    const {
      arrays: { steps, score_scale: scale },
      facts: { levels, nan },
      ranks,
    } = this;
    const scores = new Float32Array(begun).fill(NOT_SENT);
    let level = this.before[row];
    ranked.forEach((j, rank) => {
      level = (level - steps[row * ranks + rank]) & 0xffff;
      scores[j] = level === nan.scores ? NaN : (level / levels.scores) * scale[row];
    });
    return scores;
  }

  kinds({ begun, taken, forced }) {
    // one of KINDS, by number, for each block
    const kinds = new Uint8Array(this.facts.blocks).fill(1, 0, begun);
    taken.forEach((j, rank) => {
      kinds[j] = rank < forced ? 3 : 2;
    });
    return kinds;
  }

  // Dense attention's mass on what nothing read, by block; null if it was not sent.
  missed({ row, kinds, begun }) {
    const { beyond, beyond_scale: scale } = this.arrays;
    if (!beyond) return null;
    const blocks = this.facts.blocks;
    const unread = (level, j) => (kinds[j] === 1 ? (level / 255) * scale[row] : 0);
    return Float32Array.from(beyond.subarray(row * blocks, row * blocks + begun), unread);
  }

  kindOfToken(now, s) {
    // one of READ
    if (s > now.t) return "unseen";
    const kind = now.kinds[this.blockOf[s]];
    if (kind > 1) return KINDS[kind];
    if (s >= now.windowFirst) return "window";
    return s < now.summarised ? "compressed" : "unread";
  }

  probabilities(now, part) {
    // of the compressed blocks (Eq. 8): one head's, or the heads' sum
    const row = this.rowOfHead(now, part, this.parts);
    const levels = this.arrays.p.subarray(row * this.compressed, row * this.compressed + now.seen);
    return Float32Array.from(levels, (level) => (level / 255) * this.arrays.p_scale[row]);
  }

  rowOfHead({ row, q }, r, heads) {
    // where an array has heads
    const { queries } = this.facts;
    return (((row - q) / queries) * heads + r) * queries + q;
  }

  headShares(now, j) {
    // of block j's importance, by the weights that Python sent; [] if unknown
    if (this.parts < 2) return [];
    const { first, step, weights } = this.facts.pooling;
    const each = Array.from({ length: this.parts }, (_, r) => {
      const p = this.probabilities(now, r);
      return weights.reduce((sum, weight, m) => sum + weight * (p[j * step + first + m] ?? 0), 0);
    });
    const whole = each.reduce((a, b) => a + b, 0);
    return whole ? each.map((mass) => mass / whole) : [];
  }

  gate(now, branch, r) {
    // of one head of the group; nothing is drawn for NaN
    const level = this.arrays.gates[this.rowOfHead(now, r, this.heads) * 3 + branch];
    return level === this.facts.nan.gates ? 0 : level / this.facts.levels.gates;
  }

  gateWords(now, branch) {
    // the mean over the group's heads: ".41"
    const hundredths = this.arrays.gate_hundredths[now.row * 3 + branch];
    if (hundredths === this.facts.nan.gates) return "NaN";
    return (hundredths / 100).toFixed(2).replace(/^0/, "");
  }

  found(place) {
    // how many of the answers' blocks are selected
    return this.asked.filter(({ q, block }) => this.takenAt(place, q).includes(block)).length;
  }

  census(place, shown, rows, columns) {
    return census(this, place, shown, rows, columns);
  }

  describe(place, t) {
    return sentence(this, place, this.at(place, t));
  }
}
