"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const { model, layers, history } = data;
const N = model.num_tiles;
const $ = (id) => document.getElementById(id);
const number = (n, digits = 0) => n.toLocaleString("en", { maximumFractionDigits: digits, minimumFractionDigits: digits });
const bytes = (n) => (n < 1e5 ? `${number(n)} bytes` : n < 1e6 ? `${number(n / 1e3)} kB` : `${number(n / 1e6, 1)} MB`);
const visible = (token) => token.replace(/\n/g, "⏎").replace(/ /g, "␣").replace(/\t/g, "⇥");
let block = 0, kept = null;

function element(kind, options = {}, ...children) {
  const node = document.createElement(kind);
  const { style, ...rest } = options;
  Object.assign(node, rest);
  if (style) Object.assign(node.style, style);
  node.append(...children);
  return node;
}

// Tiles in the order of their clusters, so that neighbours in a cluster have neighbouring hues.
const order = () => (layers[block].clusters || [layers[block].usage.map((_, i) => i)]).flat();
function colour(tile, lightness = 0.86, chroma = 0.1) {
  return `oklch(${lightness} ${chroma} ${(order().indexOf(tile) * 360) / N})`;
}

function tip(event, text) {
  const box = $("tip");
  box.textContent = text;
  box.style.opacity = 1;
  box.style.left = `${Math.min(event.clientX + 14, innerWidth - box.offsetWidth - 8)}px`;
  box.style.top = `${event.clientY + 16}px`;
}
const noTip = () => ($("tip").style.opacity = 0);

function drawHeader() {
  const last = history.at(-1);
  $("name").textContent = data.name;
  const parts = [
    `${model.n_layers} blocks of ${N} tiles, ${model.tiles_per_token} a token (${model.ffn})`,
    `${number(model.parameters)} parameters`,
  ];
  if (data.step !== null) parts.push(`step ${number(data.step)}`);
  const now = history.find((e) => e.step === data.step) || (data.step === null ? null : last);
  if (now) parts.push(`validation loss ${number(now.val_loss ?? NaN, 3)} at step ${number(now.step)}`);
  $("summary").textContent = parts.join(" · ");
  $("blocks").replaceChildren(...layers.map((layer, i) => element("button", {
    textContent: `Block ${i}${layer.frozen ? " (held)" : layer.routes === "table" ? " (routes are a table)" : layer.routes === "hash" ? " (by a hash)" : layer.held ? " (signatures held)" : ""}`,
    ariaPressed: String(i === block),
    onclick: () => { block = i; kept = null; draw(); },
  })));
}

function drawText() {
  const tiles = layers[block].tiles;
  const nodes = [];
  data.tokens.forEach((token, i) => {
    if (i && i % data.context === 0) nodes.push(element("span", { className: "gap", title: "a new window" }));
    const node = element("span", { textContent: token, style: { background: colour(tiles[i][0]) } });
    node.dataset.tiles = ` ${tiles[i].join(" ")} `;
    node.onmousemove = (event) => tip(event, [
      `“${visible(token)}”, then a loss of ${number(data.losses[i] ?? NaN, 2)} nats`,
      ...layers.map((layer, j) => `block ${j}: tile ${layer.tiles[i].join(", ")}`),
    ].join("\n"));
    node.onmouseleave = noTip;
    nodes.push(node);
  });
  $("text").replaceChildren(...nodes);
}

function show(tile) {
  $("text").classList.toggle("alone", tile !== null);
  for (const node of $("text").children)
    node.classList.toggle("on", tile !== null && (node.dataset.tiles || "").includes(` ${tile} `));
}

function tileCard(tile) {
  const layer = layers[block];
  const share = layer.usage[tile], even = 1 / N, full = Math.max(...layer.usage, 2 * even);
  const words = element("div", { className: "words" });
  layer.words[tile].forEach(([token, part]) => words.append(element("b", {
    textContent: visible(token), title: `${number(100 * part)}% of these go here`, style: { opacity: 0.35 + 0.65 * Math.min(1, 2 * part) },
  })));
  const bar = element("div", { className: "bar", title: `${(100 * share).toFixed(1)}% of the assignments; the mark is an even share` },
    element("i", { style: { width: `${(100 * share) / full}%`, background: colour(tile, 0.68, 0.13) } }),
    element("u", { style: { left: `${(100 * even) / full}%` } }));
  const card = element("div", { className: `tile${kept === tile ? " kept" : ""}` },
    element("div", { className: "n", textContent: tile, style: { background: colour(tile) } }),
    words, bar, element("small", { textContent: `${(100 * share).toFixed(1)}%` }));
  card.onmouseenter = () => show(tile);
  card.onmouseleave = () => show(kept);
  card.onclick = () => { kept = kept === tile ? null : tile; drawTiles(); show(kept); };
  return card;
}

function drawTiles() {
  const { clusters, usage } = layers[block];
  $("tiles-hint").textContent = "The bar is the tile's share of the assignments of tokens to tiles, its mark an even share; the tokens are those it reads most above that share"
    + (clusters ? "; tiles stand under the cluster that leads to them." : ".");
  const share = (members) => members.reduce((sum, tile) => sum + usage[tile], 0);
  $("tiles").replaceChildren(...(clusters
    ? clusters.map((members, i) => element("div", { className: "cluster" },
      element("h3", { textContent: `Cluster ${i} · ${(100 * share(members)).toFixed(1)}%` }), ...members.map(tileCard)))
    : [element("div", { className: "cluster flat" }, ...order().map(tileCard))]));
}

// From blue through white to orange.
function diverging(value) {
  const t = Math.max(-1, Math.min(1, value)), end = t < 0 ? [0, 114, 178] : [213, 94, 0];
  return end.map((c) => Math.round(255 + (c - 255) * Math.abs(t)));
}

function heatmap(canvas, rows, scale) {
  canvas.width = rows[0].length;
  canvas.height = rows.length;
  const context = canvas.getContext("2d"), image = context.createImageData(canvas.width, canvas.height);
  rows.flat().forEach((value, i) => image.data.set([...diverging(value / scale), 255], 4 * i));
  context.putImageData(image, 0, 0);
}

function drawSimilarity() {
  // A table of routes has no signatures, nor has a hash.
  $("similarity").parentElement.hidden = !layers[block].similarity;
  if (!layers[block].similarity) return;
  const rows = order().map((i) => order().map((j) => layers[block].similarity[i][j]));
  const canvas = $("similarity");
  heatmap(canvas, rows, 1);
  canvas.onmousemove = (event) => {
    const place = (at, size) => order()[Math.min(N - 1, Math.max(0, Math.floor((at / size) * N)))];
    const i = place(event.offsetY, canvas.clientHeight), j = place(event.offsetX, canvas.clientWidth);
    tip(event, `tiles ${i} and ${j}: ${layers[block].similarity[i][j].toFixed(2)}`);
  };
  canvas.onmouseleave = noTip;
}

function svg(kind, attributes, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", kind);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

// Lines over training; each is {points: [[step, value]], colour, label, width}.
function lineChart(title, lines, format) {
  const [w, h, left, right] = [520, 150, 44, 70];
  lines = lines.map((line) => ({ ...line, points: line.points.filter((p) => Number.isFinite(p[1])) })).filter((line) => line.points.length);
  if (!lines.length) return element("p", { textContent: `${title}: not measured.` });
  const all = lines.flatMap((line) => line.points);
  const [lowX, highX] = [0, Math.max(...all.map((p) => p[0]))];
  let [low, high] = [Math.min(...all.map((p) => p[1])), Math.max(...all.map((p) => p[1]))];
  if (high === low) [low, high] = [low - 0.5, high + 0.5];
  const x = (v) => left + ((v - lowX) / (highX - lowX || 1)) * (w - left - right);
  const y = (v) => h - 24 - ((v - low) / (high - low)) * (h - 54);
  const chart = svg("svg", { viewBox: `0 0 ${w} ${h}` }, Object.assign(svg("text", { x: 0, y: 12, style: "fill:#23211e;font-size:12px" }), { textContent: title }));
  for (const value of [low, high]) {
    chart.append(svg("line", { class: "axis", x1: left, x2: w - right, y1: y(value), y2: y(value) }));
    chart.append(Object.assign(svg("text", { x: left - 6, y: y(value) + 4, "text-anchor": "end" }), { textContent: format(value) }));
  }
  chart.append(Object.assign(svg("text", { x: x(highX), y: h - 6, "text-anchor": "end" }), { textContent: `step ${number(highX)}` }));
  let lowest = Infinity;
  for (const line of [...lines].sort((a, b) => a.points.at(-1)[1] - b.points.at(-1)[1])) {
    const path = line.points.map(([a, b], i) => `${i ? "L" : "M"}${x(a)},${y(b)}`).join("");
    chart.append(svg("path", { d: path, fill: "none", stroke: line.colour, "stroke-width": line.width || 1.5 }));
    for (const [a, b] of line.points) chart.append(svg("circle", { cx: x(a), cy: y(b), r: line.width || 2, fill: line.colour }));
    lowest = Math.min(y(line.points.at(-1)[1]) + 4, lowest - 12);
    chart.append(Object.assign(svg("text", { x: w - right + 8, y: lowest, style: `fill:${line.colour}` }), { textContent: line.label }));
  }
  return chart;
}

function drawHistory() {
  if (!history.length) return $("history").replaceChildren(element("p", { textContent: "An export has no history." }));
  const shade = (i) => (i === block ? "#d55e00" : "#a9a39a");
  const stable = layers.map((_, i) => ({
    points: history.map((e) => [e.step, (e.routing_stability || [])[i]]),
    colour: shade(i), label: `block ${i}`, width: i === block ? 2.5 : 1.5,
  }));
  const charts = [lineChart("Validation loss, nats a token", [{ points: history.map((e) => [e.step, e.val_loss]), colour: "#23211e", label: "" }], (v) => v.toFixed(2))];
  charts.push(lineChart("Assignments kept since the evaluation before", stable, (v) => `${number(100 * v)}%`));
  const used = order().map((tile) => ({
    points: history.map((e) => [e.step, e.tile_usage[block][tile]]), colour: colour(tile, 0.68, 0.13), label: "",
  }));
  charts.push(lineChart(`Share of each tile, block ${block}`, used, (v) => `${(100 * v).toFixed(1)}%`));
  $("history").replaceChildren(...charts);
}

function dots(title, values) {
  const [w, left] = [520, 150], chart = svg("svg", { viewBox: `0 0 ${w} 34` });
  const x = (v) => left + v * (w - left - 10);
  chart.append(Object.assign(svg("text", { x: 0, y: 20, style: "fill:#23211e" }), { textContent: title }), svg("line", { class: "axis", x1: x(0), x2: x(1), y1: 16, y2: 16 }));
  for (const mark of [0, 0.5, 1]) chart.append(Object.assign(svg("text", { x: x(mark), y: 32, "text-anchor": "middle" }), { textContent: `${100 * mark}%` }));
  values.forEach((value, tile) => {
    const dot = svg("circle", { cx: x(value), cy: 16, r: 4.5, fill: colour(tile, 0.68, 0.13), "fill-opacity": 0.75 });
    dot.onmousemove = (event) => tip(event, `tile ${tile}: ${(100 * value).toFixed(2)}%`);
    dot.onmouseleave = noTip;
    chart.append(dot);
  });
  return chart;
}

function drawWeights() {
  const { zero, flips, bytes: sizes } = layers[block];
  const rows = Object.entries(zero).map(([name, values]) => dots(`zeros, ${name}`, values));
  rows.push(...Object.entries(flips).map(([name, values]) => dots(`changed lately, ${name}`, values)));
  if (!rows.length) rows.push(element("p", { textContent: "This layer keeps real weights." }));
  if (Object.keys(flips).length) rows.push(element("p", { className: "hint", textContent: "Changed lately: ternary values that differ from the checkpoint kept before this one." }));
  $("weights").replaceChildren(...rows);
  const row = (name, size, fill) => [element("span", { textContent: name }),
    element("div", {}, element("i", { style: { width: `${(100 * size) / sizes.float32}%`, background: fill } }), element("span", { textContent: bytes(size) }))];
  $("bytes").replaceChildren(element("div", { className: "bytes" },
    ...row("float32", sizes.float32, "#cfc9be"), ...row("bfloat16", sizes.float32 / 2, "#cfc9be"), ...row("two bits", sizes.packed, "#d55e00")));
}

function drawSplines() {
  const splines = layers[block].splines;
  $("splines-section").hidden = !splines;
  if (!splines) return;
  const scale = Math.max(...splines.flat(2).map(Math.abs)) || 1;
  $("splines").replaceChildren(...order().map((tile) => {
    const canvas = element("canvas");
    heatmap(canvas, splines[tile], scale);
    return element("figure", {}, canvas, element("figcaption", { textContent: `tile ${tile}` }));
  }));
}

function draw() {
  drawHeader();
  drawText();
  drawTiles();
  drawSimilarity();
  drawHistory();
  drawWeights();
  drawSplines();
  document.body.dataset.ready = "yes";
}
draw();
