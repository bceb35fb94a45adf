"use strict";
const GRID = [32, 32], N = 1024, BLOCK = 16, CELL = 288 / 32;
const KNOWN = {};  // tiles of each pattern and curve

function settings(words) {  // what patterns.js takes
  const [pattern, size] = words.split(" ");
  return { N, grid: GRID, pattern, kernel: +size, dilation: 1, window: +size, shift: 0 };
}

function tiles(words, curve) {  // of each tile of queries: the keys seen, and the tiles of keys visited
  const s = settings(words), order = curveOrder(GRID, curve), sees = attends(s, order);
  const members = range(N / BLOCK).map(t => order.slice(t * BLOCK, (t + 1) * BLOCK));
  return members.map(queries => {
    const keys = queries.map(i => keysOf(sees, N, i)), seen = new Set(keys.flat());
    const visited = range(N / BLOCK).filter(t => members[t].some(j => seen.has(j)));
    return { queries, seen: [...seen], visited, read: visited.flatMap(t => members[t]), pairs: keys.flat().length };
  });
}

const known = (...given) => KNOWN[given.join()] ??= tiles(...given);

function drawGrid(svg, tile) {
  const queries = new Set(tile.queries), seen = new Set(tile.seen), read = new Set(tile.read);
  svg.innerHTML = range(N).map(token => {
    const [row, column] = cellOf(token, GRID);
    const ground = seen.has(token) ? "color-mix(in srgb, var(--key) 60%, var(--ground))" : read.has(token) ? "var(--curve)" : "var(--cell)";
    const mark = queries.has(token) ? rect(column * CELL + 2, row * CELL + 2, CELL - 4, CELL - 4, "var(--query)") : "";
    return rect(column * CELL + 0.5, row * CELL + 0.5, CELL - 1, CELL - 1, ground) + mark;
  }).join("");
}

const share = (pairs, visited) => Math.round(100 * pairs / (visited * BLOCK * BLOCK));

function caption(name, tile, all) {
  const visits = total(all.map(t => t.visited.length));
  return `${name}: ${tile.visited.length} of ${N / BLOCK} tiles of keys, ${share(tile.pairs, tile.visited.length)} % of their pairs count. ` +
    `All tiles: ${visits} visits, ${share(total(all.map(t => t.pairs)), visits)} %.`;
}

function draw() {
  const tile = +$("tile").value, pattern = $("pattern").value, curve = $("curve").value;
  const along = known(pattern, curve), rows = known(pattern, "row_major");
  drawGrid($("along"), along[tile]);
  drawGrid($("rows"), rows[tile]);
  $("said-along").textContent = caption(`Along ${curve}`, along[tile], along);
  $("said-rows").textContent = caption("In rows", rows[tile], rows);
  const [a, b] = [along, rows].map(all => total(all.map(t => t.visited.length)));
  $("words").textContent = `The result is the same in both layouts. The work is ${a} tiles along ${curve} and ${b} in rows` +
    (a < b ? `: rows cost ${(b / a).toFixed(1)} times as much.` : a > b ? `: here rows are better, ${(a / b).toFixed(1)} times.` : ": no difference.");
}

onInput(draw);
