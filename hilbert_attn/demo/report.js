const data = JSON.parse(document.getElementById('data').textContent), photo = document.getElementById('photo');
const bytes = text => Uint8Array.from(atob(text), c => c.charCodeAt(0)).buffer;
const {rows, cols} = data, side = Math.min(Math.max(8, Math.ceil(480 / cols)), Math.floor(16384 / Math.max(rows, cols))), count = rows * cols, orders = {}, segments = {dense: new Uint16Array(count)};
for (const [name, text] of Object.entries(data.orders)) {
  orders[name] = new Uint16Array(bytes(text));
  segments[name] = new Uint16Array(count);
  orders[name].forEach((token, position) => segments[name][token] = position / data.segment);
}
const keys = data.keys && new Int8Array(bytes(data.keys));  // (heads, count, dim); queries are the same

function weights(query, segment) {  // softmax inside the segment, averaged over the heads; as the library does, from 8-bit keys
  const result = new Float32Array(count), scores = new Float32Array(count), here = segment[query];
  if (!keys) { const n = segment.reduce((sum, s) => sum + (s === here), 0); return result.map((_, i) => segment[i] === here ? 1 / n : 0); }
  for (let head = 0; head < data.heads; head++) {
    const base = head * count * data.dim, q = keys.subarray(base + query * data.dim, base + (query + 1) * data.dim);
    let top = -Infinity, total = 0;
    for (let i = 0; i < count; i++) if (segment[i] === here) {
      let dot = 0;
      for (let d = 0, at = base + i * data.dim; d < data.dim; d++) dot += q[d] * keys[at + d];
      top = Math.max(top, scores[i] = dot * data.scale);
    }
    for (let i = 0; i < count; i++) if (segment[i] === here) total += scores[i] = Math.exp(scores[i] - top);
    for (let i = 0; i < count; i++) if (segment[i] === here) result[i] += scores[i] / total / data.heads;
  }
  return result;
}

const percent = x => (100 * x).toFixed(x < 0.0995 ? 1 : 0) + '%';
const heat = [[126, 3, 168], [204, 71, 120], [248, 149, 64], [240, 249, 33]];
function heatColor(x, alpha) {
  const at = Math.min(2.999, 3 * x), i = Math.floor(at), t = at - i;
  return `rgba(${heat[i].map((c, j) => Math.round(c + t * (heat[i + 1][j] - c)))},${alpha})`;
}
function border(pen, inside, color, width) {  // lines between patches that differ
  pen.strokeStyle = color; pen.lineWidth = width; pen.beginPath();
  for (let i = 0; i < count; i++) {
    const y = Math.floor(i / cols), x = i % cols;
    if (x + 1 < cols && inside(i) !== inside(i + 1)) { pen.moveTo((x + 1) * side, y * side); pen.lineTo((x + 1) * side, (y + 1) * side); }
    if (y + 1 < rows && inside(i) !== inside(i + cols)) { pen.moveTo(x * side, (y + 1) * side); pen.lineTo((x + 1) * side, (y + 1) * side); }
  }
  pen.stroke();
}
const square = (pen, i) => pen.fillRect(i % cols * side, Math.floor(i / cols) * side, side, side);

const views = {
  walk(pen, name) {
    pen.fillStyle = 'rgba(10,12,16,.62)'; pen.fillRect(0, 0, cols * side, rows * side);
    const center = i => [(i % cols + 0.5) * side, (Math.floor(i / cols) + 0.5) * side];
    pen.lineWidth = side * 0.28; pen.lineCap = 'round';
    for (let p = 1; p < count; p++) {
      pen.strokeStyle = `hsl(${230 - 230 * p / count} 95% 60%)`;
      pen.beginPath(); pen.moveTo(...center(orders[name][p - 1])); pen.lineTo(...center(orders[name][p])); pen.stroke();
    }
  },
  cut(pen, name) {
    for (let i = 0; i < count; i++) { pen.fillStyle = `hsl(${(segments[name][i] * 137.508 + 209) % 360} 75% 52% / .62)`; square(pen, i); }
    border(pen, i => segments[name][i], '#fff', side * 0.22);
  },
  look(pen, name, query, dense) {
    const segment = segments[name], weight = name === 'dense' ? dense : weights(query, segment), top = Math.max(...weight);
    let kept = 0;
    for (let i = 0; i < count; i++) {
      const seen = segment[i] === segment[query];
      pen.fillStyle = seen ? 'rgba(0,0,0,.45)' : 'rgba(0,0,0,.87)'; square(pen, i);
      if (!seen) continue;
      kept += dense[i];
      const strength = Math.sqrt(weight[i] / top);
      if (strength > 0.02) { pen.fillStyle = heatColor(strength, 0.92 * strength ** 1.5); square(pen, i); }
    }
    border(pen, i => segment[i] === segment[query], '#fff', side * 0.22);
    pen.strokeStyle = '#41f2ff'; pen.lineWidth = side * 0.35; pen.strokeRect(query % cols * side, Math.floor(query / cols) * side, side, side);
    return kept;
  },
};
function draw(canvas, query, dense) {
  const {view, order} = canvas.dataset, pen = canvas.getContext('2d');
  canvas.width = cols * side; canvas.height = rows * side;
  pen.drawImage(photo, 0, 0, canvas.width, canvas.height);
  return views[view](pen, order, query, dense);
}

let pinned = data.start, shown = -1;
const looks = [...document.querySelectorAll('canvas[data-view=look]')], readout = document.querySelector('.readout');
function look(query) {
  if (query === shown) return;
  shown = query;
  const dense = weights(query, segments.dense), kept = {};
  for (const canvas of looks) {
    kept[canvas.dataset.order] = draw(canvas, query, dense);
    if (keys && canvas.dataset.order !== 'dense') canvas.nextElementSibling.lastElementChild.textContent = percent(kept[canvas.dataset.order]) + ' of the dense weight within reach';
  }
  const where = `Patch in row ${Math.floor(query / cols)}, column ${query % cols}`;
  const names = Object.keys(orders).sort((a, b) => kept[b] - kept[a]);
  readout.textContent = keys ? `${where}: ${names.map(name => `${name} ${percent(kept[name])}`).join(', ')} of its dense weight within reach.` : `${where}.`;
}
function start() {
  document.querySelectorAll('canvas:not([data-view=look])').forEach(canvas => draw(canvas));
  look(pinned);
  let asked = 0;
  for (const canvas of looks) {
    const under = e => {
      const box = canvas.getBoundingClientRect(), x = Math.floor((e.clientX - box.left) / box.width * cols), y = Math.floor((e.clientY - box.top) / box.height * rows);
      return Math.min(rows - 1, Math.max(0, y)) * cols + Math.min(cols - 1, Math.max(0, x));
    };
    const soon = query => { cancelAnimationFrame(asked); asked = requestAnimationFrame(() => look(query)); };
    canvas.addEventListener('click', e => soon(pinned = under(e)));
    canvas.addEventListener('pointermove', e => { if (e.pointerType === 'mouse') soon(under(e)); });
    canvas.addEventListener('pointerleave', () => soon(pinned));
    canvas.addEventListener('keydown', e => {
      const move = {ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1]}[e.key];
      if (!move) return;
      e.preventDefault();
      const y = Math.floor(pinned / cols) + move[0], x = pinned % cols + move[1];
      if (y >= 0 && y < rows && x >= 0 && x < cols) soon(pinned = y * cols + x);
    });
  }
}
photo.complete ? start() : photo.addEventListener('load', start);
