// The experiment's chart: curves of all its models, drawn by uPlot, kept live by JSON increments, never swapped.
//
//   curves     what the server has told: per model and split, columns of points; increments replace a tail
//   settings   the form above the chart, and so the address: a link shows the same view
//   draw       curves + settings -> aligned columns -> uPlot; a new chart for new settings, new data for new points
//
// A loss that is not finite has no place on the y axis: it is drawn as a triangle at the foot, and said in words.
const figure = document.getElementById("chart");
const form = document.getElementById("chart-controls");
const area = figure.querySelector(".chart-area");
const legend = figure.querySelector(".values-table tbody");
const caption = figure.querySelector("figcaption");
const marks = figure.querySelector(".chart-marks");
const resetButton = document.getElementById("reset-zoom");
const { default: uPlot } = await import(figure.dataset.uplot);

const DASHES = {
  small: [], scaled: [8, 4], large: [2, 3],
  "other-1": [10, 3, 2, 3], "other-2": [14, 5], "other-3": [4, 4], "other-4": [10, 3, 2, 3, 2, 3], "other-5": [1, 4],
};
const NAMES = {
  loss: "Cross-entropy, nats a token", perplexity: "Perplexity", bits_per_byte: "Bits per byte", accuracy: "Next-token accuracy",
  step: "Steps", tokens: "Tokens", flops: "Training FLOPs", seconds: "Training time",
};

// Figures, as the rest of the site writes them -------------------------------------------------------------------------
const short = (n) => (Math.abs(n) < 99.95 ? n.toFixed(1).replace(/\.0$/, "") : n.toFixed(0));
const si = (n) => {
  for (const [unit, size] of [["T", 1e12], ["B", 1e9], ["M", 1e6], ["k", 1e3]]) {
    if (Math.abs(n) >= size * 0.9995) return `${short(n / size)}\u00a0${unit}`;
  }
  return short(n);
};
const exponent = (n) => (n ? n.toExponential(1).replace("e+", "e").replace(".0e", "e") : "0");
const duration = (s) => {
  if (s < 59.95) return `${short(s)}\u00a0s`;
  const whole = Math.round(s);
  if (whole < 3600) return `${Math.floor(whole / 60)}\u00a0min\u00a0${String(whole % 60).padStart(2, "0")}\u00a0s`;
  return `${Math.floor(whole / 3600)}\u00a0h\u00a0${String(Math.round((whole % 3600) / 60)).padStart(2, "0")}\u00a0min`;
};
const WRITE_X = { step: (n) => Math.round(n).toLocaleString("en"), tokens: si, flops: exponent, seconds: duration };
const WRITE_Y = {
  loss: (v) => v.toFixed(3),
  perplexity: (v) => (v < 999.995 ? v.toFixed(2) : Math.round(v).toLocaleString("en")),
  bits_per_byte: (v) => v.toFixed(3),
  accuracy: (v) => `${(v * 100).toFixed(1)}\u00a0%`,
};

// Curves ---------------------------------------------------------------------------------------------------------------
const COLUMNS = ["step", "tokens", "flops", "seconds", "loss", "accuracy", "bits_per_byte"];
const models = new Map(); // name -> {name, parent, colour, state, cost, series: split -> columns}
let place = "";
let etag = "";
const hidden = new Set();

function take(answer) {
  for (const model of answer.models) {
    const known = models.get(model.name) ?? { series: {} };
    for (const [split, part] of Object.entries(model.series)) {
      const old = known.series[split] ?? { step: [] };
      let keep = old.step.findIndex((step) => step >= part.from);
      if (keep < 0) keep = old.step.length;
      const merged = { shown: part.shown, total: part.total };
      for (const column of COLUMNS) {
        const head = (old[column] ?? new Array(keep).fill(null)).slice(0, keep);
        merged[column] = head.concat(part[column] ?? new Array(part.step.length).fill(null));
      }
      known.series[split] = merged;
    }
    models.set(model.name, { ...known, ...model, series: known.series });
  }
  place = answer.place;
}

async function update() {
  const address = `${figure.dataset.url}?after=${encodeURIComponent(place)}`;
  const abort = AbortSignal.timeout(20_000);
  const headers = etag ? { "If-None-Match": etag } : {};
  const response = await fetch(address, { headers, cache: "no-store", signal: abort, credentials: "same-origin" });
  if (response.status === 304) return true;
  if (!response.ok) throw new Error(`${response.status}`);
  const answer = await response.json();
  take(answer);
  // The tag belongs to an address; the next one asks after another place, and would never match.
  etag = response.headers.get("ETag");
  if (place !== new URL(response.url).searchParams.get("after")) etag = "";
  refresh();
  return answer.active;
}

async function poll() {
  try {
    const active = await update();
    kangaroo.connection(true);
    figure.dispatchEvent(new CustomEvent("kangaroo:polled", { detail: { ok: true } }));
    if (!active) figure.dispatchEvent(new CustomEvent("kangaroo:settled"));
  } catch (error) {
    if (error instanceof TypeError || error.name === "TimeoutError") kangaroo.connection(false);
    figure.dispatchEvent(new CustomEvent("kangaroo:polled", { detail: { ok: false } }));
  }
}

// Settings -------------------------------------------------------------------------------------------------------------
const field = (name) => form.elements[name];
let smoothGiven = field("smooth").dataset.given !== "";

function settings() {
  const split = field("split").value;
  if (!smoothGiven) field("smooth").value = split === "train" ? 0.6 : 0;
  document.getElementById("smooth-shown").textContent = Number(field("smooth").value).toFixed(2);
  return {
    y: field("y").value, split, x: field("x").value, smooth: Number(field("smooth").value),
    charge: field("charge").checked, logx: field("logx").checked, logy: field("logy").checked,
  };
}

function toAddress(set) {
  const url = new URL(location.href);
  const first = { y: "loss", split: "validation", x: "step" };
  for (const name of ["y", "split", "x"]) {
    if (set[name] === first[name]) url.searchParams.delete(name);
    else url.searchParams.set(name, set[name]);
  }
  for (const name of ["charge", "logx", "logy"]) {
    if (set[name]) url.searchParams.set(name, "on");
    else url.searchParams.delete(name);
  }
  if (smoothGiven) url.searchParams.set("smooth", set.smooth);
  url.searchParams.delete("delete");
  history.replaceState(history.state, "", url);
}

// What ancestors of a model cost on the axis.
function charge(model, axis) {
  let cost = 0;
  const passed = new Set();
  for (let at = models.get(model.parent); at && !passed.has(at); at = models.get(at.parent)) {
    passed.add(at);
    cost += at.cost[axis];
  }
  return cost;
}

// Debiased moving average that forgets by distance on x, not by count, so that uneven points are smoothed alike. The
// unit of distance is the mean one between points, or a thousandth of the whole where that is more.
function smoothed(xs, ys, strength) {
  const weight = Math.min(Math.sqrt(strength), 0.999);
  const span = xs.length > 1 ? xs[xs.length - 1] - xs[0] : 0;
  if (!weight || !span) return ys;
  const units = Math.min(1000, xs.length - 1);
  let sum = 0;
  let norm = 0;
  let last = xs[0];
  return ys.map((y, i) => {
    if (y === null) return null;
    const fade = weight ** (((xs[i] - last) / span) * units);
    last = xs[i];
    sum = sum * fade + y;
    norm = norm * fade + 1;
    return sum / norm;
  });
}

// One line a model: its points in the units shown. `bad`: where its loss was not finite.
function lines(set) {
  return [...models.values()].map((model) => {
    const part = model.series[set.split] ?? { step: [] };
    const shift = set.charge ? charge(model, set.x) : 0;
    const source = set.y === "perplexity" ? "loss" : set.y;
    const line = { model, x: [], raw: [], smooth: [], bad: [], step: [] };
    (part[set.x] ?? []).forEach((at, i) => {
      const x = at + shift;
      if (set.logx && x <= 0) return;
      if (part.loss[i] === null) line.bad.push({ x, step: part.step[i] });
      const value = part[source][i];
      if (value === null) return;
      if (line.x.length && line.x[line.x.length - 1] === x) {
        line.raw[line.raw.length - 1] = value;
        return;
      }
      line.x.push(x);
      line.raw.push(value);
      line.step.push(part.step[i]);
    });
    // Perplexity is smoothed as a loss: the mean of exponentials would follow the spikes.
    line.smooth = smoothed(line.x, line.raw, set.smooth);
    if (set.y === "perplexity") {
      const exp = (v) => (v > 700 ? null : Math.exp(v));
      line.raw = line.raw.map(exp);
      line.smooth = line.smooth === line.raw ? line.raw : line.smooth.map(exp);
    }
    if (set.logy) {
      const positive = (v) => (v > 0 ? v : null);
      line.raw = line.raw.map(positive);
      line.smooth = line.smooth.map(positive);
    }
    return line;
  });
}

// Columns on the union of all x, as uPlot wants them: x, then raw and smoothed of each model.
function aligned(all) {
  const xs = [...new Set(all.flatMap((line) => line.x))].sort((a, b) => a - b);
  const at = new Map(xs.map((x, i) => [x, i]));
  const columns = [xs];
  for (const line of all) {
    const raw = new Array(xs.length).fill(null);
    const smooth = new Array(xs.length).fill(null);
    line.x.forEach((x, i) => {
      raw[at.get(x)] = line.raw[i];
      smooth[at.get(x)] = line.smooth[i];
    });
    columns.push(raw, smooth);
  }
  return columns;
}

// Axes -----------------------------------------------------------------------------------------------------------------
function niceStep(span, count) {
  const rough = span / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  return [1, 2, 5, 10].map((n) => n * power).find((n) => n >= rough);
}

function linearTicks(min, max, count) {
  const step = niceStep(max - min || 1, count);
  const ticks = [];
  for (let i = Math.ceil(min / step - 1e-9); i * step <= max + step * 1e-9; i++) ticks.push(Number((i * step).toPrecision(12)));
  return ticks;
}

// True log axes: decades, with 2 and 5 between few of them; within one decade evenly spaced round values.
function logTicks(min, max, count) {
  const decades = Math.log10(max / min);
  if (decades < 1) return linearTicks(min, max, count);
  const between = decades <= 3 ? [1, 2, 5] : [1];
  const ticks = [];
  for (let power = Math.floor(Math.log10(min)); power <= Math.ceil(Math.log10(max)); power++) {
    for (const n of between) ticks.push(Number(`${n}e${power}`));
  }
  return ticks.filter((tick) => tick >= min * 0.999 && tick <= max * 1.001);
}

const writeTick = (write, name) => (u, splits) => splits.map((value) => {
  if (value === null) return "";
  if (name === "loss" || name === "bits_per_byte") return String(Number(value.toPrecision(6)));
  if (name === "perplexity") return value >= 1000 ? si(value) : String(Number(value.toPrecision(6)));
  if (name === "accuracy") return `${Number((value * 100).toPrecision(4))}\u00a0%`;
  return write(value);
});

// Ranges of our own: uPlot's would snap a log axis out to whole decades, and one point to nothing.
function rangeOf(log, pad) {
  return (u, min, max) => {
    if (min === null || max === null) return log ? [1, 10] : [0, 10]; // no points yet: whole steps
    if (log) {
      const factor = max > min ? (max / min) ** pad : 1.1;
      return [min / factor, max * factor];
    }
    const room = max > min ? (max - min) * pad : Math.abs(max) * 0.1 || 1;
    return [min - room, max + room];
  };
}

// Drawing --------------------------------------------------------------------------------------------------------------
let plot = null;
let shown = { set: null, all: [], data: [[]] };
let zoom = null;
let building = false;

// A custom property may hold an expression that a canvas does not understand; a real element resolves it.
const probe = figure.appendChild(Object.assign(document.createElement("span"), { hidden: true }));
function css(name) {
  probe.style.color = `var(${name})`;
  return getComputedStyle(probe).color;
}
const colourOf = (name) => css(`--model-${name}`);
const ratio = () => devicePixelRatio || 1;

function options(set, all) {
  const ink = css("--tblr-secondary-color");
  const grid = css("--tblr-border-color");
  const axis = (name, write, log, size, count) => ({
    stroke: ink,
    grid: { stroke: grid, width: 1 },
    ticks: { stroke: grid, width: 1 },
    label: NAMES[name],
    labelSize: 22,
    labelFont: "12px system-ui, sans-serif",
    font: "12px system-ui, sans-serif",
    size,
    splits: (u, index, min, max) => (log ? logTicks : linearTicks)(min, max, count(u)),
    values: writeTick(write, name),
    filter: (u, splits) => splits,
  });
  const narrow = area.clientWidth < 480;
  const series = [{}];
  for (const line of all) {
    const colour = colourOf(line.model.colour);
    const dash = (DASHES[line.model.colour] ?? []).map((n) => n * ratio());
    const few = line.x.length <= 60;
    const common = { scale: "y", stroke: colour, spanGaps: true, show: !hidden.has(line.model.name) };
    const faint = set.smooth > 0 && line.x.length > 1;
    series.push({ ...common, label: `${line.model.name}, as it was`, width: 1, alpha: 0.3, show: common.show && faint, points: { show: false } });
    series.push({ ...common, label: line.model.name, width: 2, dash, points: { show: few, size: 5, fill: colour } });
  }
  return {
    width: Math.max(280, area.clientWidth),
    height: height(),
    legend: { show: false },
    padding: [12, 14, 0, 0],
    scales: {
      x: { time: false, distr: set.logx ? 3 : 1, range: rangeOf(set.logx, zoom ? 0 : 0.01) },
      y: { distr: set.logy ? 3 : 1, range: rangeOf(set.logy, 0.06) },
    },
    axes: [
      axis(set.x, WRITE_X[set.x], set.logx, 52, (u) => Math.max(2, Math.floor(u.bbox.width / ratio() / 90))),
      axis(set.y, WRITE_Y[set.y], set.logy, narrow ? 58 : 66, (u) => Math.max(2, Math.floor(u.bbox.height / ratio() / 42))),
    ],
    series,
    cursor: {
      drag: { x: true, y: false, setScale: true, dist: 6 },
      dataIdx: nearestShown,
      points: { size: 8 },
      focus: { prox: -1 },
    },
    hooks: {
      setScale: [(u, key) => key === "x" && !building && noteZoom(u)],
      setCursor: [() => values()],
      draw: [drawMarks],
    },
  };
}

const height = () => (area.clientWidth < 480 ? 280 : Math.min(460, Math.max(320, Math.round(innerHeight * 0.45))));

// The nearest point of a series itself: lines have their points at different x.
function nearestShown(u, seriesIndex, index) {
  const column = u.data[seriesIndex];
  if (seriesIndex === 0 || column[index] !== null) return index;
  const xs = u.data[0];
  let left = index;
  let right = index;
  while (left >= 0 && column[left] === null) left--;
  while (right < column.length && column[right] === null) right++;
  if (left < 0) return right < column.length ? right : null;
  if (right >= column.length) return left;
  return xs[index] - xs[left] <= xs[right] - xs[index] ? left : right;
}

function extent(u) {
  const xs = u.data[0];
  return xs.length ? [xs[0], xs[xs.length - 1]] : [0, 1];
}

function noteZoom(u) {
  const { min, max } = u.scales.x;
  const [first, last] = extent(u);
  zoom = min > first || max < last ? { min, max } : null;
  resetButton.disabled = !zoom;
}

function rebuild() {
  building = true;
  plot?.destroy();
  plot = new uPlot(options(shown.set, shown.all), shown.data, area);
  if (zoom) plot.setScale("x", zoom);
  building = false;
  resetButton.disabled = !zoom;
}

function refresh() {
  const set = settings();
  const before = shown.set;
  const all = lines(set);
  const data = aligned(all);
  const lengths = (every) => every.map((line) => `${line.model.name} ${line.x.length > 60} ${line.x.length > 1}`).join();
  const same = plot && before && JSON.stringify(before) === JSON.stringify(set) && lengths(shown.all) === lengths(all);
  if (before && (before.x !== set.x || before.charge !== set.charge || before.logx !== set.logx)) zoom = null;
  shown = { set, all, data };
  figure.querySelector(".chart-empty").hidden = data[0].length > 0;
  legendRows();
  if (same) {
    building = true;
    plot.setData(data, !zoom);
    if (zoom) plot.redraw();
    building = false;
  } else rebuild();
  describe();
  values();
}

// Where losses were not finite, and where a grown model reached the other's final loss.
function drawMarks(u) {
  const { ctx, bbox } = u;
  const size = 6 * ratio();
  ctx.save();
  ctx.beginPath();
  ctx.rect(bbox.left, bbox.top, bbox.width, bbox.height);
  ctx.clip();
  for (const line of shown.all) {
    if (hidden.has(line.model.name)) continue;
    ctx.fillStyle = colourOf(line.model.colour);
    for (const { x } of line.bad) {
      const left = u.valToPos(x, "x", true);
      const foot = bbox.top + bbox.height;
      ctx.beginPath();
      ctx.moveTo(left - size, foot);
      ctx.lineTo(left + size, foot);
      ctx.lineTo(left, foot - 1.7 * size);
      ctx.fill();
    }
  }
  for (const found of crossings()) {
    const left = u.valToPos(found.x, "x", true);
    const top = u.valToPos(found.y, "y", true);
    ctx.strokeStyle = ctx.fillStyle = css("--tblr-body-color");
    ctx.lineWidth = ratio();
    ctx.setLineDash([3 * ratio(), 3 * ratio()]);
    ctx.beginPath();
    ctx.moveTo(bbox.left, top);
    ctx.lineTo(bbox.left + bbox.width, top);
    ctx.moveTo(left, top);
    ctx.lineTo(left, bbox.top + bbox.height);
    ctx.stroke();
    ctx.setLineDash([]);
    ctx.beginPath();
    ctx.arc(left, top, 4 * ratio(), 0, 2 * Math.PI);
    ctx.fill();
  }
  ctx.restore();
}

function crossings() {
  const { set } = shown;
  if (set.split !== "validation" || !["loss", "perplexity"].includes(set.y)) return [];
  const found = [];
  for (const verdict of document.querySelectorAll("[data-crossed]")) {
    const grown = models.get(verdict.dataset.grown);
    if (!grown || hidden.has(grown.name)) continue;
    const tokensPerStep = grown.cost.tokens / grown.cost.step;
    const own = set.x === "step" ? verdict.dataset.tokens / tokensPerStep : Number(verdict.dataset[set.x]);
    const y = set.y === "loss" ? Number(verdict.dataset.target) : Math.exp(verdict.dataset.target);
    const x = own + (set.charge ? charge(grown, set.x) : 0);
    if (Number.isFinite(x) && !(set.logx && x <= 0)) found.push({ x, y });
  }
  return found;
}

// The legend is a table: every model's value at the cursor, or its newest -----------------------------------------------
function legendRows() {
  const names = shown.all.map((line) => line.model.name).join(" ");
  figure.querySelector(".legend-x").textContent = NAMES[shown.set.x];
  figure.querySelector(".legend-y").textContent = NAMES[shown.set.y].split(",")[0];
  if (legend.dataset.names === names) return;
  legend.dataset.names = names;
  legend.replaceChildren(...shown.all.map(({ model }) => {
    const row = document.createElement("tr");
    const box = Object.assign(document.createElement("input"), { type: "checkbox", className: "form-check-input", checked: !hidden.has(model.name) });
    box.setAttribute("aria-label", `Show ${model.name}`);
    box.addEventListener("change", () => {
      if (box.checked) hidden.delete(model.name);
      else hidden.add(model.name);
      rebuild();
      values();
    });
    const swatch = Object.assign(document.createElement("span"), { className: `model model-${model.colour}`, textContent: model.name });
    const head = Object.assign(document.createElement("th"), { scope: "row" });
    head.append(swatch);
    const first = document.createElement("td");
    first.append(box);
    row.append(first, head);
    for (let i = 0; i < 3; i++) row.append(Object.assign(document.createElement("td"), { className: "num" }));
    return row;
  }));
}

function nearest(xs, x) {
  let low = 0;
  let high = xs.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (xs[middle] < x) low = middle + 1;
    else high = middle;
  }
  return low > 0 && x - xs[low - 1] <= xs[low] - x ? low - 1 : low;
}

// Values of all lines nearest to the cursor; those beyond the end of a line are not claimed to be there.
function atCursor() {
  const left = plot?.cursor.left ?? -1;
  const x = left >= 0 ? plot.posToVal(left, "x") : null;
  return shown.all.map((line) => {
    if (!line.x.length) return null;
    const i = x === null ? line.x.length - 1 : nearest(line.x, x);
    return { x: line.x[i], raw: line.raw[i], smooth: line.smooth[i] };
  });
}

function values() {
  const { set } = shown;
  if (!set) return;
  const write = (value) => (value === null || value === undefined ? "–" : WRITE_Y[set.y](value));
  atCursor().forEach((point, i) => {
    const cells = legend.rows[i]?.cells;
    if (!cells) return;
    const texts = point ? [WRITE_X[set.x](point.x), write(point.raw), set.smooth ? write(point.smooth) : "–"] : ["–", "–", "–"];
    texts.forEach((text, at) => {
      if (cells[at + 2].textContent !== text) cells[at + 2].textContent = text;
    });
  });
}

function describe() {
  const { set, all } = shown;
  const parts = [...models.values()].map((model) => model.series[set.split]).filter(Boolean);
  const sum = (name) => parts.reduce((total, part) => total + part[name], 0);
  const some = sum("shown") < sum("total") ? `${sum("shown").toLocaleString("en")} of ${sum("total").toLocaleString("en")} points: the lowest and the highest of each stretch` : `all ${sum("total").toLocaleString("en")} points`;
  caption.textContent = `${NAMES[set.y]} on the ${set.split} split; ${some}. Drag to zoom.`;
  const bad = all.filter((line) => line.bad.length).map((line) => `${line.model.name}: first loss that is not finite at step ${line.bad[0].step.toLocaleString("en")}`);
  marks.hidden = !bad.length;
  marks.textContent = bad.length ? `▲ ${bad.join("; ")}.` : "";
}

// Keyboard: walk from point to point, hear all values --------------------------------------------------------------------
let saying;
function walk(event) {
  const xs = shown.data[0];
  if (!plot || !xs.length) return;
  const { min, max } = plot.scales.x;
  const visible = xs.filter((x) => x >= min && x <= max);
  if (!visible.length) return;
  const left = plot.cursor.left ?? -1;
  const at = left >= 0 ? nearest(visible, plot.posToVal(left, "x")) : -1;
  const stride = event.shiftKey ? 10 : 1;
  const to = {
    ArrowRight: Math.min(visible.length - 1, at + stride),
    ArrowLeft: at < 0 ? visible.length - 1 : Math.max(0, at - stride),
    Home: 0,
    End: visible.length - 1,
  }[event.key];
  if (to === undefined) return;
  event.preventDefault();
  plot.setCursor({ left: plot.valToPos(visible[to], "x"), top: plot.over.clientHeight / 2 });
  clearTimeout(saying);
  saying = setTimeout(() => {
    const { set, all } = shown;
    const told = atCursor().map((point, i) => point && `${all[i].model.name} ${WRITE_Y[set.y](point.smooth ?? point.raw)}`);
    kangaroo.announce(`${NAMES[set.x]} ${WRITE_X[set.x](visible[to])}: ${told.filter(Boolean).join(", ")}`);
  }, 250);
}

function zoomBy(factor) {
  if (!plot) return;
  const { min, max } = plot.scales.x;
  const log = shown.set.logx;
  const [a, b] = log ? [Math.log(min), Math.log(max)] : [min, max];
  const left = plot.cursor.left ?? -1;
  const focus = left >= 0 ? plot.posToVal(left, "x") : null;
  const middle = focus === null ? (a + b) / 2 : log ? Math.log(focus) : focus;
  const ends = [middle - (middle - a) * factor, middle + (b - middle) * factor];
  const [first, last] = extent(plot);
  const [low, high] = log ? ends.map(Math.exp) : ends;
  if (low <= first && high >= last) resetZoom();
  else setZoom(Math.max(low, first), Math.min(high, last));
}

function setZoom(min, max) {
  zoom = { min, max };
  rebuild();
}

function resetZoom() {
  zoom = null;
  rebuild();
}

area.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "+" || event.key === "=") zoomBy(0.5);
  else if (event.key === "-") zoomBy(2);
  else if (event.key === "Escape") resetZoom();
  else walk(event);
});
area.addEventListener("dblclick", resetZoom);
resetButton.addEventListener("click", () => {
  resetZoom();
  area.focus({ preventScroll: true });
});

// PNG: the canvas with title and legend, on the page's own ground ---------------------------------------------------------
document.getElementById("save-png").addEventListener("click", () => {
  if (!plot) return;
  const source = plot.ctx.canvas;
  const scale = ratio();
  const head = 58 * scale;
  const canvas = Object.assign(document.createElement("canvas"), { width: source.width, height: source.height + head });
  const ctx = canvas.getContext("2d");
  ctx.fillStyle = css("--tblr-bg-surface");
  ctx.fillRect(0, 0, canvas.width, canvas.height);
  ctx.fillStyle = css("--tblr-body-color");
  ctx.font = `600 ${15 * scale}px system-ui, sans-serif`;
  ctx.fillText(figure.dataset.title, 12 * scale, 22 * scale);
  ctx.font = `${12 * scale}px system-ui, sans-serif`;
  let left = 12 * scale;
  for (const line of shown.all) {
    if (hidden.has(line.model.name)) continue;
    ctx.strokeStyle = colourOf(line.model.colour);
    ctx.lineWidth = 2 * scale;
    ctx.setLineDash((DASHES[line.model.colour] ?? []).map((n) => n * scale));
    ctx.beginPath();
    ctx.moveTo(left, 42 * scale);
    ctx.lineTo(left + 28 * scale, 42 * scale);
    ctx.stroke();
    ctx.fillText(line.model.name, left + 34 * scale, 46 * scale);
    left += 34 * scale + ctx.measureText(line.model.name).width + 20 * scale;
  }
  const { set } = shown;
  ctx.fillText(`${set.split} split${set.smooth ? `, smoothing ${set.smooth}` : ""}${set.charge ? ", ancestors’ cost counted" : ""}`, left, 46 * scale);
  ctx.drawImage(source, 0, head);
  canvas.toBlob((blob) => {
    const link = Object.assign(document.createElement("a"), {
      href: URL.createObjectURL(blob),
      download: `${figure.dataset.title.replace(/[^\w.-]+/g, "-").toLowerCase() || "chart"}-${set.y}.png`,
    });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
  });
});

// Start ----------------------------------------------------------------------------------------------------------------
form.addEventListener("input", (event) => {
  if (event.target.name === "smooth") smoothGiven = true;
  refresh();
  toAddress(shown.set);
  if (event.target.name === "split") {
    // The table below follows: ask for what has changed once more, whatever the version.
    document.getElementById("version").value = "all:";
    document.getElementById("poll").dispatchEvent(new CustomEvent("kangaroo:poll"));
  }
});
form.addEventListener("submit", (event) => event.preventDefault());
document.addEventListener("kangaroo:theme", () => plot && rebuild());
document.addEventListener("htmx:oobAfterSwap", (event) => event.detail.target.id === "section-verdict" && plot?.redraw());
let width = 0;
new ResizeObserver(() => {
  if (plot && area.clientWidth !== width) {
    width = area.clientWidth;
    plot.setSize({ width: Math.max(280, width), height: height() });
  }
}).observe(area);
figure.addEventListener("kangaroo:poll", poll);
figure.dispatchEvent(new CustomEvent("kangaroo:watch", { bubbles: true }));
await poll();
