"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const SVG = "http://www.w3.org/2000/svg", HTML = "http://www.w3.org/1999/xhtml";
const VIRIDIS = [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]];

function color(value) {
  const place = Math.min(Math.max(value, 0), 1) * (VIRIDIS.length - 1);
  const low = Math.min(Math.floor(place), VIRIDIS.length - 2);
  const mix = VIRIDIS[low].map((c, i) => Math.round(c + (VIRIDIS[low + 1][i] - c) * (place - low)));
  return `rgb(${mix.join(",")})`;
}

function add(parent, name, attributes, text, space = SVG) {
  const element = document.createElementNS(space, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text !== undefined) element.textContent = text;
  parent.appendChild(element);
  return element;
}

function heatmap() {
  const slider = document.getElementById("layer");
  const block = data.blocks[Number(slider.value)];
  const order = document.getElementById("order").value === "family" ? data.by_family : data.pairs.map((_, i) => i);
  const place = document.getElementById("heatmap");
  const left = 8 + 7 * Math.max(...data.pairs.map((p) => p.length)), n = order.length;
  const size = Math.min(26, Math.max(14, Math.floor((place.clientWidth - left - 4) / n)));
  place.replaceChildren();
  const width = left + n * size + 4, height = left + n * size + 4;
  const svg = add(place, "svg", { viewBox: `0 0 ${width} ${height}`, width, height });
  order.forEach((i, row) => {
    add(svg, "text", { x: left - 6, y: left + row * size + size / 2 + 4, "text-anchor": "end" }, data.pairs[i]);
    const x = left + row * size + size / 2 + 4;
    add(svg, "text", { x, y: left - 6, transform: `rotate(-90 ${x} ${left - 6})` }, data.pairs[i]);
    order.forEach((j, column) => {
      const value = block.iou[i][j];
      const cell = add(svg, "rect", {
        x: left + column * size, y: left + row * size, width: size - 1, height: size - 1, fill: color(value),
      });
      add(cell, "title", {}, `${data.pairs[i]} and ${data.pairs[j]}: ${value.toFixed(3)}`);
    });
  });
  legend();
  matrix(block, order);
  slider.setAttribute("aria-valuetext", block.name);
  document.getElementById("layer-name").textContent = `${block.name}, mean ${block.mean.toFixed(3)}`;
  place.setAttribute("aria-label", `Overlap of ${n} language pairs in ${block.name}: mean ${block.mean.toFixed(3)}`);
}

function matrix(block, order) {
  const table = document.getElementById("matrix"), [body] = table.tBodies;
  table.caption.textContent = `Intersection over union in ${block.name}`;
  table.tHead.replaceChildren();
  body.replaceChildren();
  const head = table.tHead.insertRow();
  add(head, "th", { scope: "col" }, "pair", HTML);
  for (const i of order) {
    add(head, "th", { scope: "col" }, data.pairs[i], HTML);
    const row = body.insertRow();
    add(row, "th", { scope: "row" }, data.pairs[i], HTML);
    for (const j of order) add(row, "td", { class: "number" }, block.iou[i][j].toFixed(3), HTML);
  }
}

function legend() {
  const svg = add(document.getElementById("heatmap"), "svg", { viewBox: "0 0 240 34", width: 240, height: 34 });
  for (let i = 0; i < 20; i++) add(svg, "rect", { x: 10 + 11 * i, y: 2, width: 11, height: 12, fill: color(i / 19) });
  for (const tick of [0, 0.5, 1]) add(svg, "text", { x: 10 + 220 * tick, y: 29, "text-anchor": "middle" }, tick);
}

function depth() {
  const place = document.getElementById("depth");
  const width = Math.min(640, place.clientWidth), height = 240, left = 44, bottom = 34, top = 10;
  place.replaceChildren();
  const svg = add(place, "svg", { viewBox: `0 0 ${width} ${height}`, width, height });
  const lowest = Math.min(Math.floor(10 * Math.min(...data.blocks.map((b) => b.mean))), 9);  // tenths
  const y = (v) => top + (1 - (10 * v - lowest) / (10 - lowest)) * (height - top - bottom);
  for (let tenths = lowest; tenths <= 10; tenths++) {
    const tick = tenths / 10;
    add(svg, "line", { class: "axis", x1: left, x2: width - 8, y1: y(tick), y2: y(tick) });
    add(svg, "text", { x: left - 6, y: y(tick) + 4, "text-anchor": "end" }, tick.toFixed(1));
  }
  const deepest = Math.max(...["encoder", "decoder"].map((s) => data.blocks.filter((b) => b.stack === s).length));
  const x = (i) => left + 20 + (i * (width - left - 48)) / Math.max(deepest - 1, 1);
  for (let i = 0; i < deepest; i++) add(svg, "text", { x: x(i), y: height - 17, "text-anchor": "middle" }, i);
  add(svg, "text", { x: width / 2, y: height - 3, "text-anchor": "middle" }, "layer");
  for (const stack of ["encoder", "decoder"]) {
    const blocks = data.blocks.filter((b) => b.stack === stack);
    const points = blocks.map((b, i) => `${x(i)},${y(b.mean)}`).join(" ");
    add(svg, "polyline", { class: "curve", points, "stroke-dasharray": stack === "decoder" ? "6 4" : "none" });
    blocks.forEach((b, i) => {
      const mark = stack === "encoder"
        ? add(svg, "circle", { class: "mark", cx: x(i), cy: y(b.mean), r: 4 })
        : add(svg, "rect", { class: "mark", x: x(i) - 4, y: y(b.mean) - 4, width: 8, height: 8 });
      add(mark, "title", {}, `${b.name}: ${b.mean.toFixed(3)}`);
    });
  }
  const means = data.blocks.map((b) => `${b.name} ${b.mean.toFixed(2)}`).join(", ");
  place.setAttribute("aria-label", `Mean overlap per block: ${means}`);
}

document.getElementById("layer").addEventListener("input", heatmap);
document.getElementById("order").addEventListener("change", heatmap);
window.addEventListener("resize", () => { heatmap(); depth(); });
document.getElementById("drawn").hidden = false;
heatmap();
depth();
