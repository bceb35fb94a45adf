// Who attends whom: the patterns of hilbert_attn.patterns. A test answers "does token i see token j?".

function segmentTest(s, rank) { // segments of positions, dilated
  const w = Math.min(s.w, s.N), r = Math.min(s.r, w), o = s.offset % r;
  const segment = rank.map(p => Math.floor(p / w));
  const residue = rank.map(p => p % w % r);
  return (i, j) => {
    if (segment[i] !== segment[j]) return false;
    if (s.mode === "residue") return residue[i] === residue[j];
    return residue[j] === o && (s.mode === "keys" || residue[i] === o);
  };
}

function slideTest(s, rank) {
  const reach = Math.floor(s.w / 2);
  return (i, j) => Math.abs(rank[i] - rank[j]) <= reach;
}

function windowTest(s, cells) {
  const boxes = cells.map(cell => cell.map(x => Math.floor((x - s.shift) / s.window)).join());
  return (i, j) => boxes[i] === boxes[j];
}

function axisInterval(x, n, kernel, dilation) { // residue class, first and last member that are seen
  const residue = x % dilation, member = Math.floor(x / dilation);
  const last = Math.floor((n - residue + dilation - 1) / dilation) - kernel;
  const first = Math.min(Math.max(member - Math.floor(kernel / 2), 0), last);
  return { residue, member, first, last: first + kernel - 1 };
}

function neighborhoodTest(s, cells) {
  const axes = cells.map(cell => cell.map((x, axis) =>
    axisInterval(x, s.grid[axis], Math.min(s.kernel, Math.floor(s.grid[axis] / s.dilation)), s.dilation)));
  return (i, j) => axes[i].every((q, axis) => {
    const k = axes[j][axis];
    return q.residue === k.residue && k.member >= q.first && k.member <= q.last;
  });
}

function tilesTest(s, rank) {
  const size = Math.floor(s.N / s.tiles), longer = s.N % s.tiles, edge = longer * (size + 1);
  const tile = rank.map(p => {
    const place = ((p - s.offset) % s.N + s.N) % s.N;
    return place < edge ? Math.floor(place / (size + 1)) : longer + Math.floor((place - edge) / size);
  });
  return (i, j) => tile[i] === tile[j];
}

function attends(s, order) { // (i, j) => boolean, in tokens
  const rank = [];
  order.forEach((token, p) => { rank[token] = p; });
  const cells = order.map((_, token) => cellOf(token, s.grid));
  const tests = { segments: () => segmentTest(s, rank), slide: () => slideTest(s, rank),
    window: () => windowTest(s, cells), neighborhood: () => neighborhoodTest(s, cells),
    tiles: () => tilesTest(s, rank) };
  const sees = tests[s.pattern]();
  return s.causal && canBeCausal(s) ? (i, j) => j <= i && sees(i, j) : sees;
}

const canBeCausal = s => s.pattern === "segments";

function keysOf(sees, count, i) {
  const keys = [];
  for (let j = 0; j < count; j++) if (sees(i, j)) keys.push(j);
  return keys;
}

function countAll(s, sees, order) { // pairs, and blocks of the layout that hold any
  const blocks = Math.ceil(s.N / s.block), touched = new Uint8Array(blocks * blocks);
  let pairs = 0;
  for (let p = 0; p < s.N; p++)
    for (let u = 0; u < s.N; u++)
      if (sees(order[p], order[u])) {
        pairs++;
        touched[Math.floor(p / s.block) * blocks + Math.floor(u / s.block)] = 1;
      }
  const text = s.pattern === "tiles" ? s.text : 0;  // text attends all and is attended by all
  pairs += text * (s.N + text) + s.N * text;
  return { pairs, density: pairs / (s.N + text) ** 2, blocks: touched.reduce((a, b) => a + b, 0), allBlocks: blocks * blocks, touched };
}

function callOf(s) { // the line of Python that computes it
  const grid = `(${s.grid.join(", ")})`, along = `curve="${s.curve}"`;
  const causal = s.causal && canBeCausal(s) ? ", causal=True" : "";
  if (s.pattern === "segments") {
    const mode = s.r > 1 && s.mode !== "residue" ? `, dilation_mode="${s.mode}", offsets=${s.offset % s.r}` : "";
    const rate = s.r > 1 ? `, dilation_rate=${s.r}` : "";
    return `hilbert_attention(q, k, v, grid=${grid}, ${along}, segment_size=${s.w}${rate}${mode}${causal})`;
  }
  if (s.pattern === "slide") return `hilbert_slide_attention(q, k, v, ${grid}, ${s.w}, ${along})`;
  if (s.pattern === "window")
    return `window_attention(q, k, v, ${grid}, ${s.window}${s.shift ? `, shift=${s.shift}` : ""}, ${along})`;
  if (s.pattern === "neighborhood")
    return `neighborhood_attention(q, k, v, ${grid}, ${s.kernel}${s.dilation > 1 ? `, dilation=${s.dilation}` : ""}, ${along})`;
  return `tiles_shared_attention(q, k, v, grid=${grid}, ${along}, tiles=${s.tiles}, offset=${s.offset}${s.text ? `, shared=${s.text}` : ""})`;
}
