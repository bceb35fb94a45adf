// The orders of hilbert_attn.curves on grids of two or three axes. A path is a list of [a, b, ...] cells.

function evenHalf(n) {
  const half = Math.floor(n / 2);
  return half % 2 && n > 2 ? half + 1 : half;
}

function zigzag(w) { // two rows, column by column; an odd last column is entered by the diagonal step
  const path = [];
  for (let a = 0; a < w; a++) path.push(...(a % 2 ? [[a, 1], [a, 0]] : [[a, 0], [a, 1]]));
  if (w % 2) path.splice(-2, 2, [w - 1, 1], [w - 1, 0]);
  return path;
}

function rectangle(w, h) { // from (0, 0) to (w - 1, 0)
  if (h === 1) return Array.from({ length: w }, (_, a) => [a, 0]);
  if (h === 2) return zigzag(w);
  const w2 = evenHalf(w), h2 = evenHalf(h);
  if (2 * w > 3 * h)
    return [...rectangle(w2, h), ...rectangle(w - w2, h).map(([a, b]) => [w2 + a, b])];
  return [
    ...rectangle(h2, w2).map(([a, b]) => [b, a]),                          // up the left half
    ...rectangle(w, h - h2).map(([a, b]) => [a, h2 + b]),                  // across the top
    ...rectangle(h2, w - w2).map(([a, b]) => [w - 1 - b, h2 - 1 - a]),     // down the right half
  ];
}

function flatBox(sides) { // a box with a side of one cell
  const long = [0, 1, 2].filter(axis => sides[axis] > 1);
  const [a, b] = [...long, ...[0, 1, 2].filter(axis => !long.includes(axis))];
  return rectangle(sides[a], sides[b]).map(([x, y]) => {
    const cell = [0, 0, 0];
    cell[a] = x;
    cell[b] = y;
    return cell;
  });
}

function box(w, h, d) { // from (0, 0, 0) to (w - 1, 0, 0)
  if (w === 1 || h === 1 || d === 1) return flatBox([w, h, d]);
  const w2 = evenHalf(w), h2 = evenHalf(h), d2 = evenHalf(d);
  if (2 * w > 3 * h && 2 * w > 3 * d) return [
    ...box(w2, h, d),
    ...box(w - w2, h, d).map(([a, b, c]) => [w2 + a, b, c]),
  ];
  if (3 * h > 4 * d) return [
    ...box(h2, d, w2).map(([a, b, c]) => [c, a, b]),
    ...box(w, h - h2, d).map(([a, b, c]) => [a, h2 + b, c]),
    ...box(h2, d, w - w2).map(([a, b, c]) => [w - 1 - c, h2 - 1 - a, b]),
  ];
  if (3 * d > 4 * h) return [
    ...box(d2, w2, h).map(([a, b, c]) => [b, c, a]),
    ...box(w, h, d - d2).map(([a, b, c]) => [a, b, d2 + c]),
    ...box(d2, w - w2, h).map(([a, b, c]) => [w - 1 - b, c, d2 - 1 - a]),
  ];
  return [
    ...box(h2, d2, w2).map(([a, b, c]) => [c, a, b]),
    ...box(d, w2, h - h2).map(([a, b, c]) => [b, h2 + c, a]),
    ...box(w, h2, d - d2).map(([a, b, c]) => [a, h2 - 1 - b, d - 1 - c]),
    ...box(d, w - w2, h - h2).map(([a, b, c]) => [w - 1 - b, h2 + c, d - 1 - a]),
    ...box(h2, d2, w - w2).map(([a, b, c]) => [w - 1 - c, h2 - 1 - a, b]),
  ];
}

function classic(index, bits) { // Skilling's curve on a cube: the cell of one position
  const x = [0, 0, 0];
  for (let bit = 0; bit < 3 * bits; bit++) x[2 - bit % 3] |= (index >> bit & 1) << Math.floor(bit / 3);
  const carry = x[2] >> 1;
  for (let axis = 2; axis > 0; axis--) x[axis] ^= x[axis - 1];
  x[0] ^= carry;
  for (let level = 1; level < bits; level++) {
    const low = (1 << level) - 1;
    for (let axis = 2; axis >= 0; axis--) {
      const invert = x[axis] >> level & 1;
      const swap = (x[0] ^ x[axis]) & low & (invert - 1);
      x[0] ^= swap ^ (low & -invert);
      if (axis) x[axis] ^= swap;
    }
  }
  return x;
}

function hilbert(grid) {
  const side = grid[0], power = side > 1 && (side & (side - 1)) === 0;
  if (grid.length === 3 && power && grid.every(n => n === side))
    return Array.from({ length: side ** 3 }, (_, i) => classic(i, Math.log2(side)));
  const axes = grid.map((_, axis) => axis).sort((a, b) => grid[b] - grid[a] || a - b);
  const build = grid.length === 2 ? rectangle : box;
  return build(...axes.map(axis => grid[axis])).map(cell => {
    const moved = [];
    axes.forEach((axis, i) => { moved[axis] = cell[i]; });
    return moved;
  });
}

function cellOf(token, grid) {
  const cell = [];
  for (let axis = grid.length - 1; axis >= 0; axis--) {
    cell[axis] = token % grid[axis];
    token = Math.floor(token / grid[axis]);
  }
  return cell;
}

const tokenOf = (cell, grid) => cell.reduce((token, x, axis) => token * grid[axis] + x, 0);

function mortonCode(cell, grid) {
  let code = 0;
  cell.forEach((x, axis) => {
    for (let bit = 0; bit < 8; bit++)
      code |= (x >> bit & 1) << (bit * grid.length + grid.length - 1 - axis);
  });
  return code;
}

function snake(grid) {
  let order = Array.from({ length: grid.at(-1) }, (_, i) => i);
  for (const n of grid.slice(0, -1).reverse()) {
    const inner = order, back = [...order].reverse();
    order = Array.from({ length: n }, (_, i) => (i % 2 ? back : inner).map(x => x + i * inner.length)).flat();
  }
  return order;
}

function tileKey(cell, side) { return [...cell.map(x => Math.floor(x / side)), ...cell.map(x => x % side)]; }

function compareLists(a, b) {
  for (let i = 0; i < a.length; i++) if (a[i] !== b[i]) return a[i] - b[i];
  return 0;
}

function curveOrder(grid, curve) { // order[p] is the token at position p
  const count = grid.reduce((a, b) => a * b);
  const tokens = Array.from({ length: count }, (_, i) => i);
  if (curve === "hilbert") return hilbert(grid).map(cell => tokenOf(cell, grid));
  if (curve === "snake") return snake(grid);
  const cells = tokens.map(i => cellOf(i, grid));
  if (curve === "morton") {
    const codes = cells.map(cell => mortonCode(cell, grid));
    return tokens.sort((a, b) => codes[a] - codes[b]);
  }
  if (curve === "tile") {
    const keys = cells.map(cell => tileKey(cell, 8));
    return tokens.sort((a, b) => compareLists(keys[a], keys[b]));
  }
  return tokens;
}
