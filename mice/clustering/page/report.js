"use strict";
// Everything the map needs is in the JSON beside this script; nothing is fetched and nothing is written as HTML.
const byId = id => document.getElementById(id);
const data = JSON.parse(byId("data").textContent);
const n = data.names.length;
const bytes = Uint8Array.from(atob(data.numbers), letter => letter.charCodeAt(0));
const numbers = new Uint16Array(bytes.buffer);
const [x, y, cluster, second, confidence] = [0, 1, 2, 3, 4].map(row => numbers.subarray(row * n, (row + 1) * n));
const chart = byId("chart");
const layer = document.createElement("canvas");  // the map without the mark of the chosen image
const selected = new Set();  // clusters to show; none means all
let chosen = -1;
let zoom = 1, centreX = 0.5, centreY = 0.5;  // the point of the map, 0 to 1, that lies in the middle of the canvas
let width = 1, height = 1, scale = 1;
let frameRequested = false, layerReady = false;
let pen;  // where the next thing is drawn
let tiles = null;  // while the map shows pictures: their size, and which image is where

// --- thumbnails -----------------------------------------------------------------------------------
const sheets = [];
function sheet(number) {  // decoded when first needed; the map is drawn again when it is there
  if (!sheets[number]) {
    sheets[number] = new Image();
    sheets[number].onload = () => {
      redraw();
      if (chosen >= 0) showPicture();
    };
    sheets[number].src = data.sheets[number];
  }
  return sheets[number];
}
function drawThumbnail(context, i, px, py, size) {
  const per = data.columns * data.columns, source = sheet(Math.floor(i / per)), t = data.tile, slot = i % per;
  if (!source.complete || !source.naturalWidth) return false;
  const column = slot % data.columns, row = Math.floor(slot / data.columns);
  context.drawImage(source, column * t, row * t, t, t, px, py, size, size);
  return true;
}
function showPicture() {
  const canvas = byId("picture"), context = canvas.getContext("2d");
  context.imageSmoothingEnabled = data.tile >= 24;
  context.imageSmoothingQuality = "high";
  context.clearRect(0, 0, canvas.width, canvas.height);
  canvas.dataset.drawn = drawThumbnail(context, chosen, 0, 0, canvas.width) ? chosen : "";
}

// --- the map --------------------------------------------------------------------------------------
const screenX = i => width / 2 + (x[i] / 65535 - centreX) * scale;
const screenY = i => height / 2 + (y[i] / 65535 - centreY) * scale;
const visible = i => !selected.size || selected.has(cluster[i]);
const colour = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function redrawMark() {  // another image is chosen: the dots stay as they are
  if (!frameRequested) requestAnimationFrame(draw);
  frameRequested = true;
}
function redraw() {  // the dots have moved or changed
  layerReady = false;
  redrawMark();
}
function draw() {
  const ratio = devicePixelRatio || 1;
  frameRequested = false;
  width = chart.clientWidth;
  height = chart.clientHeight;
  scale = 0.92 * Math.min(width, height) * zoom;
  chart.width = Math.round(width * ratio);
  chart.height = Math.round(height * ratio);
  if (!layerReady) drawLayer(ratio);
  pen = chart.getContext("2d");
  pen.drawImage(layer, 0, 0);
  pen.setTransform(ratio, 0, 0, ratio, 0, 0);
  if (chosen < 0) return;
  if (tiles) drawLarge(tiles.size);
  else drawRing(screenX(chosen), screenY(chosen));
}
function drawLayer(ratio) {
  layer.width = chart.width;
  layer.height = chart.height;
  tiles = null;
  layerReady = true;
  pen = layer.getContext("2d");
  pen.setTransform(ratio, 0, 0, ratio, 0, 0);
  if (byId("pictures").ariaPressed === "true") drawPictures();
  else drawDots(ratio);
  chart.style.touchAction = zoom > 1 ? "none" : "pan-y";
}
const rgb = name => [1, 3, 5].map(at => parseInt(colour(name).slice(at, at + 2), 16));
function disc(radius) {  // pixels of a dot around its middle, and how much of each it covers
  const pixels = [], reach = Math.ceil(radius);
  for (let dy = -reach; dy <= reach; dy++) {
    for (let dx = -reach; dx <= reach; dx++) {
      const covered = Math.min(1, radius + 0.5 - Math.hypot(dx, dy));
      if (covered > 0) pixels.push([dx, dy, covered]);
    }
  }
  return pixels;
}
function drawDots(ratio) {  // pixel by pixel, which is many times faster than 50,000 circles drawn by the canvas
  const size = Math.min(4, Math.max(1.2, 0.17 * Math.sqrt(width * height / n)));
  const radius = Math.min(6, size * Math.sqrt(Math.sqrt(zoom)));
  const image = pen.createImageData(layer.width, layer.height), to = image.data, dot = disc(radius * ratio);
  const colours = Array.from({ length: 20 }, (_, k) => rgb(`--k${k}`)), faded = rgb("--faded"), panel = rgb("--panel");
  for (let at = 0; at < to.length; at++) to[at] = at % 4 < 3 ? panel[at % 4] : 255;
  const place = (i, fill) => {
    const px = Math.round(screenX(i) * ratio), py = Math.round(screenY(i) * ratio);
    for (const [dx, dy, covered] of dot) {
      const column = px + dx, row = py + dy, at = 4 * (row * layer.width + column);
      if (column < 0 || row < 0 || column >= layer.width || row >= layer.height) continue;
      for (let c = 0; c < 3; c++) to[at + c] += (fill[c] - to[at + c]) * covered;
    }
  };
  if (selected.size) {
    for (let i = 0; i < n; i++) if (!visible(i)) place(i, faded);
  }
  for (let j = 0; j < n; j++) {  // in mixed order (a prime larger than n visits each once), so that no cluster covers the others
    const i = (j * 1000003) % n;
    if (visible(i)) place(i, colours[cluster[i] % 20]);
  }
  pen.putImageData(image, 0, 0);
  drawClusterNumbers();
}
const middles = [];  // of each cluster: the median of its places
for (const k of new Set(cluster)) {
  const own = [];
  for (let i = 0; i < n; i++) if (cluster[i] === k) own.push(i);
  const median = values => own.map(i => values[i]).sort((a, b) => a - b)[own.length >> 1] / 65535;
  middles.push([k, median(x), median(y)]);
}
function drawClusterNumbers() {
  pen.font = "600 15px system-ui, sans-serif";
  pen.textAlign = "center";
  pen.textBaseline = "middle";
  pen.lineJoin = "round";
  pen.lineWidth = 5;
  pen.strokeStyle = colour("--panel");
  pen.fillStyle = colour("--text");
  for (const [k, mx, my] of middles) {
    if (selected.size && !selected.has(k)) continue;
    const px = width / 2 + (mx - centreX) * scale, py = height / 2 + (my - centreY) * scale;
    pen.strokeText(k, px, py);
    pen.fillText(k, px, py);
  }
}
function cellAt(px, py) {
  const columns = Math.ceil(width / tiles.size) + 2;
  return Math.floor(py / tiles.size + 1) * columns + Math.floor(px / tiles.size + 1);
}
function drawFramed(i, px, py, size, line, frame) {
  pen.fillStyle = frame;
  pen.fillRect(px, py, size, size);
  drawThumbnail(pen, i, px + line, py + line, size - 2 * line);
}
function drawPictures() {  // one for each place there is room for: the most certain one there
  tiles = { size: Math.max(28, Math.min(data.tile, 44)), best: new Map() };
  const { size, best } = tiles, columns = Math.ceil(width / size) + 2;
  for (let i = 0; i < n; i++) {
    const px = screenX(i), py = screenY(i);
    if (!visible(i) || px < -size || py < -size || px > width + size || py > height + size) continue;
    const cell = cellAt(px, py), other = best.get(cell);
    if (other === undefined || confidence[i] > confidence[other]) best.set(cell, i);
  }
  pen.imageSmoothingEnabled = data.tile >= 24;
  for (const [cell, i] of best) {
    const px = (cell % columns - 1) * size, py = (Math.floor(cell / columns) - 1) * size;
    drawFramed(i, px + 1, py + 1, size - 2, 2, colour(`--k${cluster[i] % 20}`));
  }
}
function drawLarge(size) {
  drawFramed(chosen, screenX(chosen) - size, screenY(chosen) - size, 2 * size, 4, colour("--text"));
}
function drawRing(px, py) {
  for (const [line, name] of [[6, "--paper"], [3, "--text"]]) {
    pen.beginPath();
    pen.arc(px, py, 9, 0, 2 * Math.PI);
    pen.lineWidth = line;
    pen.strokeStyle = colour(name);
    pen.stroke();
  }
}

// --- choosing an image ----------------------------------------------------------------------------
const percent = i => `${(Math.floor(confidence[i] / 10) / 10).toFixed(1)}\u00a0%`;
function announce(text) {
  byId("announcement").textContent = text;
}
function choose(i, aloud) {
  if (i < 0) return;
  chosen = i;
  const caption = byId("caption"), name = document.createElement("b");
  const rest = `cluster ${cluster[i]}, confidence ${percent(i)}; second choice: cluster ${second[i]}`;
  name.textContent = data.names[i];
  caption.replaceChildren(name, rest);
  byId("picture").ariaLabel = data.names[i];
  byId("picture").classList.toggle("coarse", data.tile < 24);
  if (aloud) announce(`${data.names[i]}: ${rest}`);
  showPicture();
  redrawMark();
}
function keepInView() {
  const px = screenX(chosen), py = screenY(chosen), edge = 24;
  if (px < edge || px > width - edge) centreX = x[chosen] / 65535;
  if (py < edge || py > height - edge) centreY = y[chosen] / 65535;
  redraw();
}
function nearest(px, py, limit, cost) {  // checks every dot: 50,000 of them take a fraction of a millisecond
  let found = -1, least = limit;
  for (let i = 0; i < n; i++) {
    if (!visible(i)) continue;
    const here = cost(screenX(i) - px, screenY(i) - py);
    if (here < least) {
      least = here;
      found = i;
    }
  }
  return found;
}
const squaredDistance = (dx, dy) => dx * dx + dy * dy;
function imageAt(event) {  // the one under the pointer, -1 if there is none
  if (tiles) return tiles.best.get(cellAt(event.offsetX, event.offsetY)) ?? -1;
  return nearest(event.offsetX, event.offsetY, 24 * 24, squaredDistance);
}
function walk(sx, sy) {  // to the nearest dot in a direction; straight ahead counts as closer than aside
  if (chosen < 0) return nearest(width / 2, height / 2, Infinity, squaredDistance);
  return nearest(screenX(chosen), screenY(chosen), Infinity, (dx, dy) => {
    const ahead = dx * sx + dy * sy, aside = Math.abs(dx * sy) + Math.abs(dy * sx);
    return ahead > 1e-6 && aside <= 1.5 * ahead ? ahead * ahead + 3 * aside * aside : Infinity;
  });
}
function nextVisible(from, by) {  // images are ordered by cluster, the most certain first
  for (let i = from; i >= 0 && i < n; i += by) if (visible(i)) return i;
  return -1;
}
function endOfCluster(by) {
  let i = Math.max(chosen, 0);
  while (i + by >= 0 && i + by < n && cluster[i + by] === cluster[i]) i += by;
  return i;
}
function zoomBy(factor, px = width / 2, py = height / 2) {  // the point under (px, py) stays where it is
  const after = Math.min(Math.max(zoom * factor, 1), 200);
  centreX += (px - width / 2) / scale;
  centreY += (py - height / 2) / scale;
  scale *= after / zoom;
  zoom = after;
  centreX -= (px - width / 2) / scale;
  centreY -= (py - height / 2) / scale;
  if (zoom === 1) centreX = centreY = 0.5;
  redraw();
}
function zoomIn() {  // on the chosen image
  if (chosen < 0) zoomBy(1.5);
  else zoomBy(1.5, screenX(chosen), screenY(chosen));
}

const walks = {
  ArrowLeft: () => walk(-1, 0), ArrowRight: () => walk(1, 0), ArrowUp: () => walk(0, -1), ArrowDown: () => walk(0, 1),
  PageDown: () => nextVisible(chosen + 1, 1), PageUp: () => nextVisible(chosen - 1, -1),
  Home: () => endOfCluster(-1), End: () => endOfCluster(1),
};
const zooms = { "+": zoomIn, "=": zoomIn, "-": () => zoomBy(1 / 1.5), "0": () => zoomBy(0) };
chart.addEventListener("keydown", event => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (walks[event.key]) {
    choose(walks[event.key](), true);
    if (chosen >= 0) keepInView();
  } else if (zooms[event.key]) {
    zooms[event.key]();
  } else {
    return;
  }
  event.preventDefault();
});
let drag = null;
chart.addEventListener("pointerdown", event => {
  drag = { px: event.offsetX, py: event.offsetY, moved: false };
});
chart.addEventListener("pointermove", event => {
  if (!drag || !(event.buttons & 1)) {
    choose(imageAt(event), false);
    return;
  }
  const dx = event.offsetX - drag.px, dy = event.offsetY - drag.py;
  if (zoom === 1 || (!drag.moved && Math.hypot(dx, dy) < 4)) return;
  chart.setPointerCapture(event.pointerId);
  centreX -= dx / scale;
  centreY -= dy / scale;
  drag = { px: event.offsetX, py: event.offsetY, moved: true };
  redraw();
});
chart.addEventListener("pointerup", event => {
  if (drag && !drag.moved) choose(imageAt(event), true);
  drag = null;
});
chart.addEventListener("pointercancel", () => { drag = null; });
chart.addEventListener("wheel", event => {  // pinching, or the wheel on a map that has the focus; else the page scrolls
  if (!event.ctrlKey && document.activeElement !== chart) return;
  event.preventDefault();
  zoomBy(Math.exp(-event.deltaY / 300), event.offsetX, event.offsetY);
}, { passive: false });

byId("in").onclick = zoomIn;
byId("out").onclick = () => zoomBy(1 / 1.5);
byId("all").onclick = () => zoomBy(0);
function toggle(button) {
  button.ariaPressed = String(button.ariaPressed !== "true");
  return button.ariaPressed === "true";
}
byId("pictures").onclick = event => {
  toggle(event.currentTarget);
  redraw();
};
for (const button of document.querySelectorAll("[data-k]")) {
  button.onclick = () => {
    const k = Number(button.dataset.k);
    if (toggle(button)) selected.add(k);
    else selected.delete(k);
    redraw();
  };
}
byId("find").addEventListener("keydown", event => {  // Enter goes to the next file with these letters in its name
  if (event.key !== "Enter") return;
  const text = event.target.value.toLowerCase();
  for (let j = 1; text && j <= n; j++) {
    const i = (chosen + j + n) % n;
    if (data.names[i].toLowerCase().includes(text)) {
      choose(i, true);
      keepInView();
      return;
    }
  }
  byId("caption").textContent = text ? `No file name contains ${text}.` : "";
  announce(byId("caption").textContent);
});

// --- the galleries: one tab stop for each row, arrow keys within it -------------------------------
for (const strip of document.querySelectorAll(".strip")) {
  const links = [...strip.querySelectorAll("a")];
  links.forEach((link, i) => {
    link.tabIndex = i ? -1 : 0;
    link.onclick = () => {
      choose(Number(link.dataset.i), true);
      keepInView();
      setTimeout(() => chart.focus({ preventScroll: true }));  // once the browser has followed the link
    };
    link.onkeydown = event => {
      const to = links[i + (event.key === "ArrowRight") - (event.key === "ArrowLeft")];
      if (!to || to === link) return;
      link.tabIndex = -1;
      to.tabIndex = 0;
      to.focus();
      event.preventDefault();
    };
  });
}
new ResizeObserver(redraw).observe(chart);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
matchMedia("print").addEventListener("change", () => {  // at once, for the printer does not wait for a frame
  layerReady = false;
  draw();
});
