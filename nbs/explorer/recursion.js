"use strict";
const COPIES = ["#2f7ed0", "#2b9a66", "#c77700", "#8a5bd6"];

function hilbert(m) {  // cells [row, column] by position
  if (m === 0) return [[0, 0]];
  const quarter = hilbert(m - 1), half = 2 ** (m - 1);
  const first = quarter.map(([i, j]) => [j, i]);                                // mirrored
  const second = quarter.map(([i, j]) => [i, j + half]);
  const third = quarter.map(([i, j]) => [i + half, j + half]);
  const fourth = quarter.map(([i, j]) => [2 * half - 1 - j, half - 1 - i]);     // mirrored
  return [...first, ...second, ...third, ...fourth];
}

function keys(p, n, w, r) {  // the positions that p attends, its own residue of its segment
  const start = Math.floor(p / w) * w, found = [];
  for (let k = start + (p - start) % r; k < Math.min(start + w, n); k += r) found.push(k);
  return found;
}

function choices(select, numbers) {
  const kept = +select.value;
  select.innerHTML = numbers.map(x => `<option>${x}</option>`).join("");
  select.value = numbers.includes(kept) ? kept : numbers[Math.min(1, numbers.length - 1)];
}

function settle() {
  const n = 4 ** +chosen("m");
  choices($("w"), [2, 4, 8, 16, 32, 64].filter(w => w <= n));
  choices($("r"), [1, 2, 4, 8].filter(r => r <= +$("w").value));
  $("p").max = n - 1;
}

function draw() {
  const m = +chosen("m"), walk = hilbert(m), n = walk.length;
  const p = +$("p").value, w = +$("w").value, r = +$("r").value, side = 320 / 2 ** m;
  const seen = new Set(keys(p, n, w, r)), segment = Math.floor(p / w);
  const at = ([i, j]) => `${(j + 0.5) * side},${(i + 0.5) * side}`;
  const cells = walk.map(([i, j], k) => {
    const fill = k === p ? "color-mix(in srgb, var(--query) 55%, var(--ground))" : seen.has(k) ? "color-mix(in srgb, var(--key) 35%, var(--ground))"
      : Math.floor(k / w) === segment ? "var(--line)" : "var(--cell)";
    return `<rect x="${j * side + 1}" y="${i * side + 1}" width="${side - 2}" height="${side - 2}" style="fill: ${fill}"/>`;
  });
  const copies = COPIES.map((colour, c) => {
    const part = walk.slice(c * n / 4, (c + 1) * n / 4);
    return `<polyline points="${part.map(at).join(" ")}" style="fill: none; stroke: ${colour}; stroke-width: 4; stroke-linejoin: round; stroke-linecap: round"/>` +
      part.map(cell => { const [x, y] = at(cell).split(","); return `<circle cx="${x}" cy="${y}" r="4" style="fill: ${colour}"/>`; }).join("");
  });
  const joints = [1, 2, 3].map(c => `<polyline points="${at(walk[c * n / 4 - 1])} ${at(walk[c * n / 4])}" style="stroke: var(--ink); stroke-width: 3; stroke-dasharray: 3 5"/>`);
  $("curve").innerHTML = cells.join("") + joints.join("") + copies.join("");
  const copy = Math.floor(4 * p / n), which = ["first, mirrored", "second", "third", "last, mirrored"][copy];
  const [row, column] = walk[p], residue = p % w % r;
  $("words").textContent = `Position ${p} is row ${row}, column ${column}: in the ${which} copy; segment ${segment}, residue ${residue}. ` +
    `It attends ${seen.size} of ${n} positions.`;
}

settle();
$("w").value = 4;
settle();
$("r").value = 1;
onInput(() => { settle(); draw(); });
