// The page: state in the address, a grid to point at, figures beside it.

const START = { T: 1, H: 32, W: 32, curve: "hilbert", line: false, pattern: "segments", w: 64, r: 1,
  mode: "residue", offset: 0, causal: false, window: 8, shift: 0, kernel: 7, dilation: 1, tiles: 4,
  text: 0, block: 64, token: 0 };
const form = document.getElementById("controls");
const canvas = document.getElementById("grid"), mask = document.getElementById("mask");
const inputs = [...form.elements].filter(input => input.name);
let state = { ...START }, scene = null;

function color(name) { return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim(); }

function clamp(value, input) {
  const number = Math.round(Number(value));
  if (!Number.isFinite(number)) return START[input.name];
  return Math.min(Math.max(number, Number(input.min)), Number(input.max));
}

function valueOf(input, value) { // what an input may hold, from the form or from the address
  if (input.type === "checkbox") return value === true || value === "true";
  if (input.type === "number") return clamp(value, input);
  const known = [...input.options].map(option => option.value);
  const chosen = known.includes(String(value)) ? String(value) : String(START[input.name]);
  return input.name === "block" ? Number(chosen) : chosen;
}

function settle(raw) { // a state whose numbers fit together
  const s = { ...START, token: Math.max(0, Number(raw.token) || 0) };
  for (const input of inputs) s[input.name] = valueOf(input, raw[input.name] ?? START[input.name]);
  s.grid = s.T > 1 ? [s.T, s.H, s.W] : [s.H, s.W];
  while (s.grid.reduce((a, b) => a * b) > 4096) { s.T--; s.grid = s.T > 1 ? [s.T, s.H, s.W] : [s.H, s.W]; }
  s.N = s.grid.reduce((a, b) => a * b);
  s.w = Math.min(s.w, s.N);
  s.r = Math.min(s.r, s.w);
  s.offset = s.pattern === "tiles" ? Math.min(s.offset, s.N - 1) : s.mode === "residue" ? 0 : s.offset % s.r;
  s.shift = Math.min(s.shift, s.window - 1);
  s.kernel = Math.min(s.kernel, ...s.grid.map(n => Math.floor(n / s.dilation)).map(n => Math.max(n, 1)));
  s.dilation = Math.min(s.dilation, ...s.grid);
  s.tiles = Math.min(s.tiles, s.N);
  s.token = Math.min(s.token, s.N - 1);
  return s;
}

function build(s) { // everything that does not depend on the token
  const order = curveOrder(s.grid, s.curve), sees = attends(s, order);
  return { order, sees, totals: countAll(s, sees, order) };
}

function cellSize() {
  const across = state.W * state.T + (state.T - 1), wide = canvas.parentElement.clientWidth;
  return Math.max(3, Math.min(28, Math.floor(Math.min(wide / across, 640 / state.H))));
}

function place(token, size) { // upper left corner of a token's cell, in pixels
  const cell = cellOf(token, state.grid), [t, row, column] = state.T > 1 ? cell : [0, ...cell];
  return [(t * (state.W + 1) + column) * size, row * size];
}

function sharpen(target, wide, high) { // as many pixels as the screen has
  const scale = window.devicePixelRatio || 1;
  target.width = wide * scale;
  target.height = high * scale;
  target.style.width = `${wide}px`;
  const pen = target.getContext("2d");
  pen.scale(scale, scale);
  return pen;
}

function drawLine(pen, size) {
  pen.strokeStyle = color("curve");
  pen.lineWidth = Math.max(1, size / 8);
  pen.beginPath();
  scene.order.forEach((token, p) => {
    const [x, y] = place(token, size);
    pen[p ? "lineTo" : "moveTo"](x + size / 2, y + size / 2);
  });
  pen.stroke();
}

function drawGrid(keys) {
  const size = cellSize(), gap = size > 5 ? 1 : 0;
  const pen = sharpen(canvas, (state.W * state.T + state.T - 1) * size, state.H * size);
  const fill = (token, name) => {
    const [x, y] = place(token, size);
    pen.fillStyle = color(name);
    pen.fillRect(x, y, size - gap, size - gap);
  };
  for (let token = 0; token < state.N; token++) fill(token, "cell");
  for (const token of keys) fill(token, "key");
  if (state.line) drawLine(pen, size);
  const [x, y] = place(state.token, size);
  pen.strokeStyle = color("query");
  pen.lineWidth = Math.max(2, size / 6);
  pen.strokeRect(x, y, size - gap, size - gap);
}

function drawMask() {
  const { touched } = scene.totals, blocks = Math.ceil(state.N / state.block), size = 240 / blocks;
  const pen = sharpen(mask, 240, 240);
  pen.fillStyle = color("cell");
  pen.fillRect(0, 0, 240, 240);
  pen.fillStyle = color("key");
  touched.forEach((hit, n) => {
    if (hit) pen.fillRect(n % blocks * size, Math.floor(n / blocks) * size, Math.max(size - .5, .5), Math.max(size - .5, .5));
  });
}

function show(id, text) { document.getElementById(id).textContent = text; }

const percent = x => `${(100 * x).toPrecision(3)} %`;

function describe(keys) {
  const here = cellOf(state.token, state.grid);
  const away = key => Math.max(...cellOf(key, state.grid).map((x, axis) => Math.abs(x - here[axis])));
  const near = keys.filter(key => away(key) <= 4).length, totals = scene.totals;
  const text = state.pattern === "tiles" ? state.text : 0;
  show("keys", `${keys.length + text} of ${state.N + text}`);
  show("near", keys.length ? percent(near / keys.length) : "none");
  show("pairs", totals.pairs.toLocaleString("en"));
  show("density", percent(totals.density));
  show("blocks", `${totals.blocks.toLocaleString("en")} of ${totals.allBlocks.toLocaleString("en")}`);
  show("call", callOf(state));
  show("about", `Token ${state.token} at (${here.join(", ")}) attends ${keys.length + text} keys.`);
}

function remember() {
  const changed = Object.keys(START).filter(name => state[name] !== START[name]);
  const query = new URLSearchParams(changed.map(name => [name, state[name]]));
  history.replaceState(null, "", query.size ? `#${query}` : location.pathname + location.search);
}

function refresh() { // after the token moved
  const keys = keysOf(scene.sees, state.N, state.token);
  drawGrid(keys);
  describe(keys);
  remember();
}

function rebuild(raw) { // after a setting changed
  state = settle(raw);
  for (const input of inputs) {
    if (input.type === "checkbox") input.checked = state[input.name];
    else input.value = state[input.name];
  }
  for (const label of form.querySelectorAll("[data-for]"))
    label.hidden = !label.dataset.for.split(" ").includes(state.pattern);
  scene = build(state);
  drawMask();
  refresh();
}

function fromForm() {
  const raw = { token: state.token };
  for (const input of inputs) raw[input.name] = input.type === "checkbox" ? input.checked : input.value;
  rebuild(raw);
}

function fromAddress() { rebuild(Object.fromEntries(new URLSearchParams(location.hash.slice(1)))); }

function pointAt(event) {
  const box = canvas.getBoundingClientRect(), size = cellSize();
  const x = Math.floor((event.clientX - box.left) / size), row = Math.floor((event.clientY - box.top) / size);
  const t = Math.floor(x / (state.W + 1)), column = x % (state.W + 1);
  if (column >= state.W || row < 0 || row >= state.H || t >= state.T || x < 0) return;
  const token = tokenOf(state.T > 1 ? [t, row, column] : [row, column], state.grid);
  if (token !== state.token) { state.token = token; refresh(); }
}

function move(event) {
  const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -state.W, ArrowDown: state.W };
  const step = steps[event.key];
  if (!step || !(state.token + step in scene.order)) return;
  event.preventDefault();
  state.token += step;
  refresh();
}

async function copy(text, button) {
  try { await navigator.clipboard.writeText(text); } catch { prompt("Copy:", text); }
  const before = button.textContent;
  button.textContent = "Copied";
  setTimeout(() => { button.textContent = before; }, 1200);
}

form.addEventListener("change", fromForm);
form.addEventListener("submit", event => event.preventDefault());
canvas.addEventListener("pointermove", pointAt);
canvas.addEventListener("pointerdown", pointAt);
canvas.addEventListener("keydown", move);
addEventListener("hashchange", fromAddress);
addEventListener("resize", refresh);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => rebuild(state));
document.getElementById("copy").addEventListener("click", e => copy(callOf(state), e.target));
document.getElementById("share").addEventListener("click", e => copy(location.href, e.target));
fromAddress();
