"use strict";
// What the steppers share.
const $ = id => document.getElementById(id);
const chosen = name => document.querySelector(`[name=${name}]:checked`).value;
const range = n => [...Array(n).keys()];
const total = numbers => numbers.reduce((a, b) => a + b, 0);

function rect(x, y, width, height, fill) {
  return `<rect x="${x}" y="${y}" width="${width}" height="${height}" style="fill: ${fill}"/>`;
}

function text(x, y, words, anchor = "start") {
  return `<text x="${x}" y="${y}" text-anchor="${anchor}">${words}</text>`;
}

function onInput(draw) {
  for (const part of document.querySelectorAll("input, select")) part.addEventListener("input", draw);
  draw();
}
