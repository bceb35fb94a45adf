"use strict";
// Scores and values of twelve keys. The largest score comes late, and e to the 13 is no float16.
const scores = [2, 4.5, 1, 3, 6, 0.5, 5, 9, 2.5, 13, 7, 4];
const values = scores.map((_, j) => [Math.cos(j), Math.sin(2 * j)]);
const HALF_MAX = 65504;
const SAID = {
  right: "When a tile brings a new maximum, alpha is below 1: everything summed so far is rescaled to the new shift.",
  forgotten: "Sums from before are still shifted by an older, smaller maximum, so old keys weigh too much. Nothing overflows, weights are positive, and a model trains on it.",
  apart: "Each tile has a softmax of its own, and the results are added: the weights of a row sum to the number of tiles.",
  unshifted: "Exact in theory. In float16, e to the 13 is more than 65504: infinity, and infinity by infinity is no number.",
  masked: "The keys of the first tile are masked: -∞. Its maximum is -∞ too, and -∞ - (-∞) is no number. The shift has to be 0 there.",
};
const half = x => Math.abs(x) > HALF_MAX ? Math.sign(x) * Infinity : x;

function exact(seen, hidden = 0) {
  const some = scores.map((s, j) => j < hidden ? -Infinity : s).slice(0, seen);
  const m = Math.max(...some, -Infinity);
  if (m === -Infinity) return [0, 0];
  const p = some.map(s => Math.exp(s - m)), l = p.reduce((a, b) => a + b, 0);
  return [0, 1].map(d => p.reduce((a, x, j) => a + x * values[j][d], 0) / l);
}

function run(seen, tile, way) {
  let m = -Infinity, l = 0, acc = [0, 0], alpha = 1;
  for (let j = 0; j < seen; j += tile) {
    const keys = [...Array(Math.min(tile, seen - j)).keys()].map(i => i + j);
    const s = keys.map(i => way === "masked" && i < tile ? -Infinity : scores[i]);
    const top = Math.max(m, ...s);
    alpha = Math.exp(m - top);
    let p = s.map(x => Math.exp(x - top));
    if (way === "forgotten") alpha = 1;
    if (way === "apart") {
      const own = Math.max(...s), e = s.map(x => Math.exp(x - own)), sum = e.reduce((a, b) => a + b);
      p = e.map(x => x / sum);
      alpha = 1;
    }
    if (way === "unshifted") { p = s.map(x => half(Math.exp(x))); alpha = 1; }
    l = alpha * l + p.reduce((a, b) => a + b);
    acc = acc.map((a, d) => alpha * a + p.reduce((t, x, i) => t + x * values[keys[i]][d], 0));
    if (way === "unshifted") { l = half(l); acc = acc.map(half); }
    m = top;
  }
  const over = way === "apart" ? 1 : l;  // each tile is normalised already
  const out = seen ? acc.map(a => a / over) : [0, 0];
  return {m, l, alpha, acc, out, exact: exact(seen, way === "masked" ? tile : 0)};
}

const number = x => Number.isNaN(x) ? "NaN" : Math.abs(x) === Infinity ? (x > 0 ? "∞" : "-∞")
  : Math.abs(x) >= 1e4 ? x.toExponential(2) : x.toFixed(3);

function draw() {
  const seen = +$("seen").value, tile = +$("tile").value;
  const way = chosen("way");
  const now = run(seen, tile, way);
  for (const name of ["m", "alpha", "l"]) $(name).textContent = number(now[name]);
  for (const name of ["acc", "out", "exact"]) $(name).textContent = now[name].map(number).join(", ");
  const off = now.out.some((x, d) => !(Math.abs(x - now.exact[d]) < 1e-9));
  $("out").classList.toggle("wrong", off);
  $("words").textContent = SAID[way] + (seen === 0 ? "" : off ? " The output is wrong by now." : " The output is right so far.");
  const bars = scores.map((s, j) => {
    const x = 6 + 49.5 * j, hidden = way === "masked" && j < tile;
    const look = j < seen && !hidden ? "fill: var(--key)" : "fill: var(--cell); stroke: var(--line)";
    const edge = j && j % tile === 0
      ? `<line x1="${x - 4}" x2="${x - 4}" y1="10" y2="170" style="stroke: var(--line)"/>` : "";
    return `${edge}<rect x="${x}" y="${165 - 11.5 * s}" width="41" height="${11.5 * s}" style="${look}"/>` +
      `<text x="${x + 20}" y="184" text-anchor="middle" style="fill: var(--soft); font: 13px system-ui, sans-serif">${hidden ? "-∞" : s}</text>`;
  });
  const line = now.m === -Infinity ? "" : `<line x1="0" x2="600" y1="${165 - 11.5 * now.m}" y2="${165 - 11.5 * now.m}" style="stroke: var(--query); stroke-dasharray: 5 4"/>`;
  $("bars").innerHTML = bars.join("") + line;
}

onInput(draw);
