"use strict";
const N = 48, SIDE = 288 / N;

function runs(rank, ranks, layout) {  // [start, stop) of the positions that a rank holds
  const chunk = N / ranks / (layout === "zigzag" ? 2 : 1);
  const chunks = layout === "zigzag" ? [rank, 2 * ranks - 1 - rank] : [rank];
  return chunks.map(c => [c * chunk, (c + 1) * chunk]);
}

const positions = (...at) => runs(...at).flatMap(([start, stop]) => range(stop - start).map(i => start + i));
const holder = (rank, step, ranks) => (rank - step + ranks) % ranks;  // whose keys a rank has in a round

function pairs(rank, source, ranks, layout, causal) {
  const keys = positions(source, ranks, layout);
  return total(positions(rank, ranks, layout).map(q => keys.filter(k => !causal || k <= q).length));
}

function round(step, ranks, layout, causal) {  // pairs of each rank
  return range(ranks).map(rank => pairs(rank, holder(rank, step, ranks), ranks, layout, causal));
}

function drawMask(step, ranks, layout, causal) {
  const blocks = [];
  for (const rank of range(ranks))
    for (const s of range(ranks))
      for (const [q0, q1] of runs(rank, ranks, layout))
        for (const [k0, k1] of runs(holder(rank, s, ranks), ranks, layout)) {
          const fill = s === step ? "var(--key)" : s < step ? "color-mix(in srgb, var(--key) 35%, var(--ground))" : "var(--cell)";
          blocks.push(rect(k0 * SIDE + 0.5, q0 * SIDE + 0.5, (k1 - k0) * SIDE - 1, (q1 - q0) * SIDE - 1, fill));
        }
  const steps = range(N).map(p => `${(p + 1) * SIDE},${p * SIDE} ${(p + 1) * SIDE},${(p + 1) * SIDE}`);
  if (causal) blocks.push(`<polygon points="288,0 0,0 ${steps.join(" ")}" style="fill: var(--ground); opacity: .85"/>`);
  $("mask").innerHTML = blocks.join("");
}

function drawBars(step, ranks, layout, causal) {
  const now = round(step, ranks, layout, causal), most = (N / ranks) ** 2, height = 288 / ranks;
  $("bars").innerHTML = now.map((count, rank) => {
    const y = rank * height, source = holder(rank, step, ranks);
    return text(0, y + height * 0.4, `rank ${rank}, keys of rank ${source}: ${count} pairs`) +
      rect(0, y + height * 0.5, 288, height * 0.3, "var(--cell)") +
      rect(0, y + height * 0.5, 288 * count / most, height * 0.3, "var(--key)");
  }).join("");
}

function describe(step, ranks, layout, causal) {
  const all = range(ranks).map(s => round(s, ranks, layout, causal)), now = all[step];
  const work = total(all.map(total)), waited = total(all.map(counts => Math.max(...counts))) * ranks;
  const idle = now.filter(count => count === 0).length;
  return `Round ${step + 1} of ${ranks}. ` +
    (step ? `K and V have moved ${step} ${step > 1 ? "ranks" : "rank"} on. ` : "Each rank begins with its own keys; nothing has been sent. ") +
    (idle ? `${idle} of ${ranks} ranks have nothing to compute. ` : Math.min(...now) < Math.max(...now) ? "Some ranks wait for the slowest. " : "All ranks compute alike. ") +
    `Done so far: ${total(all.slice(0, step + 1).map(total))} of ${work} pairs. ` +
    `If every round takes as long as its slowest rank, the ranks are busy ${Math.round(100 * work / waited)} % of the time.`;
}

function draw() {
  const ranks = +$("ranks").value;
  $("step").max = ranks - 1;
  const now = [+$("step").value, ranks, chosen("layout"), $("causal").checked];
  drawMask(...now);
  drawBars(...now);
  $("words").textContent = describe(...now);
}

onInput(draw);
