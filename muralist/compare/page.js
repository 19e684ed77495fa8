// Draws the report from the JSON in #data. Everything that comes from prompts, files or errors goes into text nodes, never into markup.
"use strict";

const D = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";

// --- small helpers -----------------------------------------------------------------------------------------------------------------

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) node.setAttribute(name, value);
  for (const child of children.flat(Infinity)) if (child !== null && child !== undefined) node.append(child);
  return node;
}
const el = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);
const draw = (tag, attributes, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);
const colour = (i) => `var(--c${i % 8})`;
const sideColour = (side) => colour(D.sides.indexOf(side));
const clamp = (x, low, high) => Math.min(Math.max(x, low), high);

function format(value, unit) {
  if (value === null || value === undefined) return "–";
  if (unit === "B") {
    const units = ["B", "kB", "MB", "GB", "TB"];
    let power = 0;
    while (value >= 999.5 && power < 4) { value /= 1000; power += 1; }
    return `${Number(value.toPrecision(3))} ${units[power]}`;
  }
  if (unit === "s" && value >= 5400) return `${(value / 3600).toFixed(1)} h`;
  if (unit === "s" && value >= 90) return `${(value / 60).toFixed(1)} min`;
  const size = Math.abs(value);
  const text = size >= 1e6 || (size > 0 && size < 1e-5) ? value.toExponential(2) : String(Number(value.toPrecision(4)));
  return unit ? `${text} ${unit}` : text;
}
const arrow = (better) => ({ higher: "↑", lower: "↓" })[better] || "";
const measured = () => Object.entries(D.measures).filter(([name]) => D.sides.some((side) => D.summary[side][name]));
const sceneName = (scene) => (scene.prompt ? `${scene.prompt} · seed ${scene.seed}` : "all files");

// --- summary -----------------------------------------------------------------------------------------------------------------------

function summaryTable() {
  const head = el("tr", {}, el("th", {}, ""), D.sides.map((side) => el("th", {}, side)));
  const rows = [];
  let group = "";
  for (const [name, measure] of measured()) {
    if (measure.group !== group) rows.push(el("tr", { class: "group" }, el("td", { colspan: D.sides.length + 1 }, (group = measure.group))));
    const title = `${measure.summary}${measure.origin ? ` (${measure.origin})` : ""}`;
    const cells = D.sides.map((side) => el("td", {}, summaryCell(side, name, measure)));
    rows.push(el("tr", {}, el("td", { title }, measure.label, " ", el("small", {}, `${arrow(measure.better)} ${measure.unit === "B" || measure.unit === "s" ? "" : measure.unit}`)), cells));
  }
  $("table").append(el("table", {}, el("thead", {}, head), el("tbody", {}, rows)));
  const failed = D.cells.filter((cell) => cell.failure).length;
  const shared = "Means over the scenes in which every column has a value; ± is the standard error. ↑ higher is better, ↓ lower is better; the best of a row is marked, outlined only where its lead is within the noise of these scenes.";
  $("fairness").textContent = (D.scenes.length > 1 ? shared : "↑ higher is better, ↓ lower is better; the best of a row is marked.") + (failed ? ` ${failed} of ${D.cells.length} runs failed: see Videos.` : "");
}

// "clear", "close" (the lead is within two standard errors of the differences), or false.
function isBest(side, name) {
  const found = D.best[name];
  return Boolean(found && found.sides.includes(side)) && (found.clear ? "clear" : "close");
}

function summaryCell(side, name, measure) {
  const found = D.summary[side][name];
  if (!found) return "–";
  const unit = measure.unit === "B" || measure.unit === "s" ? measure.unit : "";
  const text = format(found.mean, unit);
  const best = isBest(side, name);
  const error = found.error ? el("small", {}, ` ±${format(found.error, unit)}`) : null;
  return el("span", {}, best ? el("span", { class: `best ${best}`, title: best === "clear" ? "best of the row" : "best mean, but within the noise of these scenes" }, text) : text, error);
}

// --- player ------------------------------------------------------------------------------------------------------------------------

const player = { scene: 0, a: null, b: null, wipe: 0.5, u: 0.5, v: 0.5, playing: false };
const video = (which) => $(`video-${which}`);
const picture = (which) => ($("stills").checked || video(which).dataset.failed ? $(`still-${which}`) : video(which));
const fps = () => player[lead()].video.fps || 16;

function options(select, texts, chosen) {
  select.replaceChildren(...texts.map((text, i) => el("option", { value: i }, text)));
  select.value = chosen;
}

function startPlayer() {
  const shown = D.cells.filter((cell) => cell.media);
  if (!shown.length) { $("player").hidden = true; return; }
  options($("scene"), D.scenes.map(sceneName), (player.scene = shown[0].scene));
  $("scene").onchange = () => { player.scene = Number($("scene").value); chooseSides(); };
  for (const which of ["a", "b"]) $(`side-${which}`).onchange = () => loadSides();
  $("swap").onclick = () => { [$("side-a").value, $("side-b").value] = [$("side-b").value, $("side-a").value]; loadSides(); };
  $("play").onclick = () => (player.playing ? pause() : play());
  $("back").onclick = () => step(-1);
  $("forward").onclick = () => step(1);
  $("time").oninput = () => { pause(); seek((Number($("time").value) / 1000) * duration()); };
  $("wipe").oninput = () => setWipe(Number($("wipe").value) / 1000);
  $("beside").onchange = $("stills").onchange = $("seams").onchange = showModes;
  $("zoom").onchange = loupe;
  for (const which of ["a", "b"]) {
    video(which).onerror = () => troubled(which);
    video(which).onseeked = video(which).onloadeddata = $(`still-${which}`).onload = loupe;
    video(which).onended = () => { if (player.playing && which === lead()) { seek(0); play(); } };
  }
  pointer();
  document.addEventListener("keydown", keys);
  window.addEventListener("resize", loupe);
  chooseSides();
}

function here() { return D.cells.filter((cell) => cell.scene === player.scene && cell.media); }

function chooseSides() {
  const cells = here(), names = cells.map((cell) => cell.side);
  const keep = (side, otherwise) => { const i = side ? names.indexOf(side.side) : -1; return i < 0 ? Math.min(otherwise, names.length - 1) : i; };
  const [a, b] = [keep(player.a, 0), keep(player.b, 1)];
  options($("side-a"), names, a);
  options($("side-b"), names, b);
  loadSides();
}

function loadSides() {
  pause();
  const cells = here();
  for (const which of ["a", "b"]) {
    const cell = (player[which] = cells[Number($(`side-${which}`).value)]);
    if (!cell) { $("stage").hidden = true; return; }
    $("stage").hidden = false;
    delete video(which).dataset.failed;
    video(which).src = cell.media.video;
    $(`still-${which}`).src = cell.media.still;
    $(`layer-${which}`).querySelector(".tag").textContent = `${which.toUpperCase()}  ${cell.side}`;
    seamLines($(`layer-${which}`).querySelector("svg"), cell);
  }
  showModes();
  clock();
}

function seamLines(svg, cell) {
  const { width, height } = cell.video;
  fill(svg, { viewBox: `0 0 ${width} ${height}`, preserveAspectRatio: "none" }, []);
  const lines = cell.borders ? [...cell.borders.x.map((x) => [x, 0, x, height]), ...cell.borders.y.map((y) => [0, y, width, y])] : [];
  svg.replaceChildren(...lines.map(([x1, y1, x2, y2]) => draw("line", { x1, y1, x2, y2 })));
}

function showModes() {
  const beside = $("beside").checked, { width, height } = player.a.video;
  $("stage").className = [beside ? "beside" : "wipe", $("seams").checked ? "show-seams" : ""].join(" ");
  $("stage").style.aspectRatio = `${beside ? 2 * width : width} / ${height}`;
  for (const which of ["a", "b"]) {
    $(`still-${which}`).hidden = picture(which) !== $(`still-${which}`);
    video(which).hidden = picture(which) !== video(which);
  }
  const known = ["a", "b"].filter((which) => player[which].borders && player[which].borders.x.length + player[which].borders.y.length);
  const failed = ["a", "b"].filter((which) => video(which).dataset.failed).map((which) => player[which].media.video);
  const told = failed.length ? [`This browser does not play ${failed.join(" and ")}; the middle frame is shown instead.`] : [];
  if ($("seams").checked && !known.length) told.push("No tile borders here: decoded in one piece, or not known for these files.");
  $("trouble").textContent = told.join(" ");
  setWipe(player.wipe);
}

function troubled(which) {
  video(which).dataset.failed = "1";
  showModes();
}

function length(which) { return player[which].video.num_frames / (player[which].video.fps || 16); }
function lead() { return length("b") > length("a") ? "b" : "a"; } // the longer one, which the other follows
function duration() { return length(lead()); }

function seek(seconds) {
  for (const which of ["a", "b"]) {
    const { num_frames, fps: rate } = player[which].video;
    // The middle of a frame's time, so that rounding never shows its neighbour.
    const frame = clamp(Math.floor(seconds * (rate || 16) + 1e-6), 0, num_frames - 1);
    video(which).currentTime = (frame + 0.5) / (rate || 16);
  }
  clock(seconds);
}

function play() {
  player.playing = true;
  $("play").textContent = "Pause";
  if (video(lead()).ended) seek(0);
  for (const which of ["a", "b"]) video(which).play().catch(() => {});
  requestAnimationFrame(follow);
}

function pause() {
  player.playing = false;
  $("play").textContent = "Play";
  for (const which of ["a", "b"]) video(which).pause();
}

function follow() {
  if (!player.playing) return;
  const [first, second] = lead() === "a" ? [video("a"), video("b")] : [video("b"), video("a")];
  const apart = Math.abs(first.currentTime - second.currentTime) > 1.5 / fps();
  if (apart && !first.seeking && !second.seeking && first.currentTime < second.duration) second.currentTime = first.currentTime;
  clock();
  loupe();
  requestAnimationFrame(follow);
}

function step(frames) {
  pause();
  const now = Math.floor(video(lead()).currentTime * fps());
  seek(clamp(now + frames, 0, player[lead()].video.num_frames - 1) / fps());
}

function clock(seconds = video(lead()).currentTime) {
  const frame = clamp(Math.floor(seconds * fps() + 1e-6), 0, player[lead()].video.num_frames - 1);
  $("clock").textContent = `${seconds.toFixed(2)} s · frame ${frame + 1} / ${player[lead()].video.num_frames}`;
  if (document.activeElement !== $("time") || player.playing) $("time").value = Math.round((1000 * seconds) / duration());
}

function keys(event) {
  if (["INPUT", "SELECT", "TEXTAREA", "BUTTON"].includes(event.target.tagName)) return;
  const actions = { " ": () => (player.playing ? pause() : play()), ",": () => step(-1), ".": () => step(1) };
  if (actions[event.key]) { event.preventDefault(); actions[event.key](); }
}

function setWipe(share) {
  player.wipe = clamp(share, 0, 1);
  const beside = $("beside").checked;
  $("layer-b").style.clipPath = beside ? "" : `inset(0 0 0 ${100 * player.wipe}%)`;
  $("handle").style.left = `${100 * player.wipe}%`;
  $("wipe").value = Math.round(1000 * player.wipe);
  loupe();
}

function pointer() {
  const stage = $("stage");
  const place = (event) => {
    const box = stage.getBoundingClientRect();
    const x = clamp((event.clientX - box.left) / box.width, 0, 1);
    player.v = clamp((event.clientY - box.top) / box.height, 0, 1);
    player.u = $("beside").checked ? (x * 2) % 1 : x;
    if (event.buttons & 1 && !$("beside").checked) setWipe(x); else loupe();
  };
  stage.addEventListener("pointermove", place);
  stage.addEventListener("pointerdown", (event) => { stage.setPointerCapture(event.pointerId); place(event); });
}

// --- loupe -------------------------------------------------------------------------------------------------------------------------

function loupe() {
  if (!player.a || !player.b) return;
  for (const which of ["a", "b"]) magnify(which, Number($("zoom").value));
}

// One pixel of the video is `zoom` pixels of the screen: nothing is resampled, whatever the size of the window.
function magnify(which, zoom) {
  const canvas = $(`loupe-${which}`), source = picture(which), cell = player[which], { width, height } = cell.video;
  const side = Math.round(canvas.clientWidth * (window.devicePixelRatio || 1));
  if (canvas.width !== side || canvas.height !== side) canvas.width = canvas.height = side;
  const context = canvas.getContext("2d"), seen = Math.floor(side / zoom);
  const left = clamp(Math.round(player.u * width - seen / 2), 0, Math.max(width - seen, 0));
  const top = clamp(Math.round(player.v * height - seen / 2), 0, Math.max(height - seen, 0));
  context.imageSmoothingEnabled = false;
  context.clearRect(0, 0, side, side);
  const [w, h] = [Math.min(seen, width), Math.min(seen, height)];
  if (source.readyState === undefined || source.readyState >= 2) context.drawImage(source, left, top, w, h, 0, 0, w * zoom, h * zoom);
  $(`loupe-${which}-text`).textContent = `${which.toUpperCase()} ${cell.side}: columns ${left}–${left + w - 1}, rows ${top}–${top + h - 1} of ${width}×${height}`;
  if (which === "a") {
    const box = { left: left / width, top: top / height, width: w / width, height: h / height };
    for (const [name, share] of Object.entries(box)) $("reticle").style[name] = `${100 * share}%`;
    $("reticle").style.display = $("beside").checked ? "none" : "block";
  }
}

// --- plots -------------------------------------------------------------------------------------------------------------------------

function legend(names, colours) {
  return el("div", { class: "legend" }, names.map((name, i) => el("span", {}, el("i", { style: `background:${colours[i]}` }), name)));
}

function bars() {
  for (const [name, measure] of measured()) {
    const sides = D.sides.filter((side) => D.summary[side][name]);
    const values = sides.flatMap((side) => [1, -1].map((sign) => D.summary[side][name].mean + sign * (D.summary[side][name].error || 0))), top = Math.max(...values.map(Math.abs)) || 1;
    const low = Math.min(0, ...sides.map((side) => D.summary[side][name].mean)), span = Math.max(0, ...values) - low || top, x = (value) => 110 + (170 * (value - low)) / span;
    const rows = sides.map((side, i) => {
      const found = D.summary[side][name], y = 6 + 24 * i, best = isBest(side, name);
      const whisker = found.error ? draw("path", { d: `M${x(found.mean - found.error)} ${y + 8}H${x(found.mean + found.error)}`, stroke: "var(--ink)" }) : null;
      return draw("g", {}, draw("title", {}, `${side}: ${format(found.mean, measure.unit)}`), draw("text", { x: 104, y: y + 12, "text-anchor": "end" }, short(side, 15)),
        draw("rect", { x: Math.min(x(0), x(found.mean)), y, width: Math.max(Math.abs(x(found.mean) - x(0)), 1), height: 16, rx: 2, fill: sideColour(side) }), whisker,
        draw("text", { x: 288, y: y + 12, "font-weight": best === "clear" ? 700 : 400 }, format(found.mean, measure.unit === "B" || measure.unit === "s" ? measure.unit : "") + (best === "clear" ? " ★" : "")));
    });
    const plot = draw("svg", { class: "plot", viewBox: `0 0 370 ${12 + 24 * sides.length}`, role: "img", "aria-label": measure.label }, rows);
    $("bars").append(el("div", { title: measure.summary }, el("h3", {}, `${measure.label} ${arrow(measure.better)}`), plot));
  }
}

const short = (text, most) => (text.length > most ? `${text.slice(0, most - 1)}…` : text);

function stageBars() {
  const sides = D.sides.filter((side) => D.stages[side] && D.stages[side].length);
  if (!sides.length) return;
  const stages = [...new Set(sides.flatMap((side) => D.stages[side].map((s) => s.stage)))];
  const longest = Math.max(...sides.map((side) => D.stages[side].reduce((sum, s) => sum + s.seconds, 0))) || 1;
  const rows = sides.map((side, i) => {
    let x = 130;
    const y = 8 + 32 * i, parts = D.stages[side].map((s) => {
      const width = (640 * s.seconds) / longest, part = draw("rect", { x, y, width, height: 22, fill: colour(stages.indexOf(s.stage)) }, draw("title", {}, `${s.stage}: ${format(s.seconds, "s")}`));
      x += width;
      return part;
    });
    const total = D.stages[side].reduce((sum, s) => sum + s.seconds, 0);
    return draw("g", {}, draw("text", { x: 122, y: y + 15, "text-anchor": "end" }, short(side, 18)), parts, draw("text", { x: x + 8, y: y + 15 }, format(total, "s")));
  });
  $("stages").append(el("h3", {}, "Time by stage"), legend(stages, stages.map((_, i) => colour(i))), draw("svg", { class: "plot", viewBox: `0 0 860 ${14 + 32 * sides.length}` }, rows));
}

// Mean over scenes of the level in decibels. The axis counts cycles per picture height, so that files of different sizes can be laid over one another.
function spectra() {
  const curves = D.sides.map((side) => [side, meanSpectrum(D.cells.filter((cell) => cell.side === side && cell.spectrum))]).filter(([, curve]) => curve.length > 1);
  if (!curves.length) return;
  const points = curves.flatMap(([, curve]) => curve), xs = points.map((p) => p[0]), ys = points.map((p) => p[1]);
  const [x0, x1] = [Math.min(...xs), Math.max(...xs)], [y0, y1] = [10 * Math.floor(Math.min(...ys) / 10), 10 * Math.ceil(Math.max(...ys) / 10)];
  const X = (x) => 60 + (780 * (x - x0)) / (x1 - x0), Y = (y) => 300 - (280 * (y - y0)) / (y1 - y0 || 1);
  const grid = [];
  for (let y = y0; y <= y1; y += 10) grid.push(draw("path", { class: "axis", d: `M60 ${Y(y)}H840` }), draw("text", { class: "soft", x: 52, y: Y(y) + 4, "text-anchor": "end" }, `${y} dB`));
  for (const tick of [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 4000]) {
    const x = Math.log10(tick);
    if (x >= x0 && x <= x1) grid.push(draw("path", { class: "axis", d: `M${X(x)} 20V300` }), draw("text", { class: "soft", x: X(x), y: 316, "text-anchor": "middle" }, String(tick)));
  }
  const lines = curves.map(([side, curve]) => draw("path", { d: "M" + curve.map(([x, y]) => `${X(x).toFixed(1)} ${Y(y).toFixed(1)}`).join("L"), fill: "none", stroke: sideColour(side), "stroke-width": 1.8 }, draw("title", {}, side)));
  $("spectra").append(el("h3", { title: "Radially averaged power of luma, Hann window, mean over frames and scenes" }, "Spectra: power over cycles per picture height"),
    legend(curves.map(([side]) => side), curves.map(([side]) => sideColour(side))), draw("svg", { class: "plot", viewBox: "0 0 860 324" }, grid, lines));
}

function meanSpectrum(cells) {
  const sums = new Map();
  for (const cell of cells) for (const [f, level] of cell.spectrum) {
    const x = Math.log10(f * cell.video.height), [sum, count] = sums.get(x) || [0, 0];
    sums.set(x, [sum + level, count + 1]);
  }
  return [...sums].sort((p, q) => p[0] - q[0]).map(([x, [sum, count]]) => [x, sum / count]);
}

// --- every video -------------------------------------------------------------------------------------------------------------------

function cards() {
  D.scenes.forEach((scene, index) => {
    const cells = D.cells.filter((cell) => cell.scene === index);
    $("cards").append(el("div", { class: "card" }, el("h3", {}, sceneName(scene)), el("div", { class: "row" }, cells.filter((cell) => cell.media).map(pictures)), cells.map(facts)));
  });
}

function pictures(cell) {
  return el("figure", {}, el("div", { class: "row" }, el("img", { src: cell.media.thumb, alt: `middle frame, ${cell.side}` }), el("img", { src: cell.media.crop, alt: `native pixels, ${cell.side}` })),
    el("figcaption", {}, `${cell.side}: middle frame, and native pixels of its centre · `, el("a", { href: cell.media.video }, "video"), " · ", el("a", { href: cell.media.still }, "still")));
}

function facts(cell) {
  const title = el("summary", {}, cell.side, cell.failure ? el("span", { class: "bad" }, ` failed: ${cell.failure}`) : "");
  const rows = Object.entries(cell.values).map(([name, value]) => el("tr", {}, el("td", {}, D.measures[name] ? D.measures[name].label : name), el("td", {}, format(value, D.measures[name] ? D.measures[name].unit : ""))));
  const stages = (cell.stages || []).map((s) => el("tr", {}, el("td", {}, `stage ${s.stage}`), el("td", {}, `${format(s.seconds, "s")}, peak ${format(s.peak_rss, "B")}${s.peak_device ? `, device ${format(s.peak_device, "B")}` : ""}`)));
  const v = cell.video;
  const what = v ? el("p", { class: "hint" }, `${v.width}×${v.height}, ${v.num_frames} frames, ${Number(v.fps.toFixed(3))} fps, ${v.codec} ${v.bit_depth} bit${cell.attempts > 1 ? ` · finished in ${cell.attempts} attempts, each of which loaded the weights: its times are no clean measurement` : ""}`) : null;
  const command = cell.command ? el("div", {}, el("span", { class: "hint" }, "To make it again, in any directory:"), el("code", { class: "command" }, cell.command)) : null;
  const source = cell.path ? el("p", { class: "hint" }, cell.path) : null;
  return el("details", cell.failure ? { open: "" } : {}, title, what, source, command, el("div", { class: "wide" }, el("table", {}, el("tbody", {}, rows, stages))));
}

function notes() {
  const items = measured().map(([, m]) => [el("dt", {}, `${m.label} ${arrow(m.better)}`), el("dd", {}, `${m.summary}${m.unit && m.unit !== "B" && m.unit !== "s" ? `, in ${m.unit}` : ""}${m.origin ? `. ${m.origin}` : ""}`)]);
  const skipped = Object.entries(D.skipped).map(([name, reason]) => [el("dt", {}, `${name}: not measured`), el("dd", {}, reason)]);
  $("definitions").append(el("dl", {}, items, skipped), el("p", { class: "hint" }, Object.entries(D.versions).map(([name, version]) => `${name} ${version}`).join(", "), ` · ${D.machine}`));
}

$("subtitle").textContent = D.subtitle;
$("theme").onclick = () => {
  const dark = getComputedStyle(document.documentElement).colorScheme === "dark" || (document.documentElement.dataset.theme !== "light" && matchMedia("(prefers-color-scheme: dark)").matches);
  document.documentElement.dataset.theme = dark ? "light" : "dark";
};
summaryTable();
bars();
stageBars();
spectra();
cards();
notes();
startPlayer();
