// --- words: the sentence, and what else the numbers of one query say ---

const list = (ids) => [...ids].sort((a, b) => a - b).join(" ") || "none";
const share = (
  part, // .25
) => (part > 0 && part < 0.005 ? "under .01" : part.toFixed(2).replace(/^0/, ""));

function range(first, last) {
  if (last < first) return "none";
  return last === first ? `${first}` : `${first}-${last}`;
}

function sentence(trace, place, now) {
  // the words of TracedSequence.describe
  const { t, taken, forced, byScore, seen, windowFirst, answer } = now;
  const { checkpoints } = trace.facts;
  const how = byScore ? "by score" : "not by score";
  const free = list(taken.subarray(forced));
  const selected = taken.length ? `${list(taken)} (${free} ${how})` : "none";
  const gates = [0, 1, 2].map((branch) => trace.gateWords(now, branch)).join(" ");
  const found = taken.includes(answer) ? "selected" : "not selected";
  return (
    `query ${t}: compressed blocks ${range(0, seen - 1)}, selected ${selected}, ` +
    `window ${range(windowFirst, t)}, gates ${gates}` +
    (answer >= 0 ? `; answer in block ${answer}: ${found}` : "") +
    (checkpoints.length > 1 ? `; checkpoint ${checkpoints[place.checkpoint]}` : "")
  );
}

function remarks(trace, place, now) {
  // a line each
  const { q, t, taken, byScore, scores, ranked, missed, begun } = now;
  const {
    ranks,
    facts: { traced_n: traced, blocks },
  } = trace;
  const lines = [margin(now)];
  if (missed) lines.push(missedWords(missed));
  if (q > 0 && taken.length) {
    const before = trace.takenAt(place, q - 1);
    const shared = taken.filter((j) => before.includes(j));
    const percent = Math.round((100 * shared.length) / taken.length);
    lines.push(`overlap with query ${trace.positions[q - 1]}: ${percent} % of the blocks`);
  }
  if (place.n !== traced && byScore) {
    const then = trace.takenAt({ ...place, n: traced }, q);
    const out = list(then.subarray(taken.length));
    const into = list(taken.subarray(then.length));
    lines.push(`n = ${place.n} for ${traced}: blocks ${out} drop out, ${into} come in`);
  }
  const bad = ranked.filter((j) => Number.isNaN(scores[j]));
  if (bad.length) lines.push(`scores of blocks ${list(bad)} are NaN; the layer counts them as 0`);
  if (begun > ranks)
    lines.push(`the ${ranks} best of ${blocks} blocks were sent; other scores are not drawn`);
  return lines;
}

function missedWords(missed) {
  const whole = missed.reduce((a, b) => a + b, 0);
  const worst = missed.indexOf(missed.reduce((a, b) => Math.max(a, b), 0));
  const most = missed[worst] > 0 ? `, most of it in block ${worst} (${share(missed[worst])})` : "";
  return `missed: ${share(whole)} of dense attention's mass is on tokens that nothing read${most}`;
}

const byScoreOf = ({ scores }, j) => (Number.isNaN(scores[j]) ? 0 : scores[j]);

function margin(now) {
  // of the last taken over the next
  const { byScore, ranked, taken, forced, scores, begun } = now;
  if (!byScore) return "these blocks were not chosen by their score, so n cannot be changed";
  const [last, next] = ranked.subarray(taken.length - 1, taken.length + 1);
  if (next === undefined) {
    return begun > ranked.length ? "the next block's score was not sent" : "no block is left out";
  }
  if (taken.length === forced) return "only forced blocks are selected";
  const score = (j) => scores[j].toPrecision(3);
  return (
    `lowest score selected: ${score(last)} (block ${last}); next: ${score(next)} ` +
    `(block ${next}); margin ${(scores[last] - scores[next]).toPrecision(2)}`
  );
}

// --- the block in focus ---

function blockFacts(trace, now, j) {
  const { kinds, scores, t, missed, answer } = now;
  const status = ["not begun at this query", "not selected", "selected", "forced"][kinds[j]];
  const from = j * trace.size;
  const said = [
    `block ${j}, tokens ${range(from, Math.min(trace.length, from + trace.size) - 1)}: ${status}`,
  ];
  if (answer === j) said.push("holds the answer");
  if (trace.own(t) === j) said.push("the query's own block");
  if (kinds[j] === 0) return said.join(", ");
  const score = scores[j] === NOT_SENT ? "not sent" : scores[j].toPrecision(3);
  said.push(`importance ${score}`, ...rankWords(now, j));
  const heads = scores[j] > 0 ? trace.headShares(now, j) : [];
  if (heads.length) said.push(`heads' shares ${heads.map(share).join(" ")}`);
  if (missed && kinds[j] === 1) said.push(`dense attention's mass missed here ${share(missed[j])}`);
  return said.join(", ");
}

// Its rank among the blocks that compete, and how far it is from the line between in and out.
function rankWords(now, j) {
  const { ranked, taken, forced, kinds, begun, byScore } = now;
  if (!byScore || kinds[j] === 3) return [];
  const rank = ranked.indexOf(j) - forced;
  if (rank < 0)
    return [`rank below ${ranked.length - forced} of the ${begun - forced} that compete`];
  const words = [`rank ${rank + 1} of the ${begun - forced} that compete`];
  const chosen = kinds[j] === 2;
  const rival = ranked[chosen ? taken.length : taken.length - 1];
  if (rival === undefined || (!chosen && taken.length === forced)) return words;
  const gap = Math.abs(byScoreOf(now, j) - byScoreOf(now, rival)).toPrecision(2);
  return [
    ...words,
    `${gap} ${chosen ? "above the best left out" : "below the last chosen"} (block ${rival})`,
  ];
}

function blockTokens(trace, j) {
  // each by itself, so that none turns the others' direction
  return trace.tokens.slice(j * trace.size, (j + 1) * trace.size);
}

function blockWords(trace, j) {
  const from = j * trace.size;
  const to = Math.min(trace.length, from + trace.size);
  return `block ${j}, tokens ${range(from, to - 1)}: ` + blockTokens(trace, j).join(gap(trace));
}

const gap = (trace) => (trace.longest > 1 ? " " : "");

// --- tokens, checkpoints and panes ---

function tokenWords(trace, now, s) {
  // the title of a token, and what is spoken of it
  const also = [];
  if (s === now.t) also.push("the query");
  if (s === now.answerAt) also.push("the answer");
  const j = trace.blockOf[s];
  if (now.missed && s < now.windowFirst && now.missed[j] >= MISSED) {
    also.push(`missed: ${share(now.missed[j])} of dense attention's mass is on its block`);
  }
  return [
    `token ${s} \u201C${trace.tokens[s]}\u201D, block ${j}: ${READ[trace.kindOfToken(now, s)]}`,
    ...also,
  ].join(", ");
}

function checkpointWords(trace, place) {
  const words = trace.facts.checkpoints[place.checkpoint];
  if (!trace.asked.length) return words;
  return `${words}: ${trace.found(place)} of ${trace.asked.length} answers' blocks selected`;
}

function placeWords(trace, place) {
  const name = trace.facts.checkpoints[place.checkpoint];
  return `${name ? `${name}, ` : ""}layer ${place.layer}, group ${place.group}`;
}

function difference(now, other) {
  // the words of SelectionExplorer.difference
  const [here, there] = [[...now.taken], [...other.taken]];
  const both = here.filter((j) => there.includes(j));
  const only = (a, b) => list(a.filter((j) => !b.includes(j)));
  return (
    `query ${now.t}: ${both.length} blocks in both (${list(both)}), ` +
    `only in the first ${only(here, there)}, only beside ${only(there, here)}`
  );
}
