// Every feature of a layer: forget score against retain score on logarithmic axes, drawn on a canvas.
// props.value: {features, forget, retain, marks, tokens}; a click triggers "select" with {feature}.
const canvas = element.querySelector("canvas"), tip = element.querySelector(".tip");
const ROOM = { left: 54, right: 12, top: 10, bottom: 40 };
let data = null, places = [], near = -1;

function colour(name) { return getComputedStyle(element.firstElementChild).getPropertyValue(name).trim(); }

function scale(low, high, from, to) {
  const a = Math.log10(low), b = Math.log10(high);
  const at = (v) => from + (to - from) * (Math.log10(v) - a) / (b - a || 1);
  at.ticks = [];
  const step = Math.max(1, Math.ceil((b - a) / 6));
  for (let e = Math.ceil(a); e <= b; e += step) at.ticks.push(e);
  return at;
}

function shape(g, mark, x, y) {
  g.beginPath();
  if (mark === "relevant") g.arc(x, y, 5.5, 0, 7);
  else if (mark === "irrelevant") { g.moveTo(x, y + 5); g.lineTo(x - 5, y - 4); g.lineTo(x + 5, y - 4); g.closePath(); }
  else if (mark === "chosen") { g.moveTo(x, y - 7); g.lineTo(x + 7, y); g.lineTo(x, y + 7); g.lineTo(x - 7, y); g.closePath(); }
  else g.arc(x, y, 2.2, 0, 7);
}

function draw() {
  const wide = element.clientWidth, tall = Math.min(520, Math.max(300, wide * 0.62)), sharp = window.devicePixelRatio || 1;
  if (!wide || !data || !data.features) return;
  canvas.width = wide * sharp; canvas.height = tall * sharp; canvas.style.height = tall + "px";
  const g = canvas.getContext("2d");
  g.scale(sharp, sharp);
  g.clearRect(0, 0, wide, tall);
  const positive = data.forget.concat(data.retain).filter((v) => v > 0);
  g.font = "12px system-ui, sans-serif"; g.fillStyle = colour("--soft");
  if (!positive.length) { g.fillText("no feature fires", 20, 30); places = []; return; }
  let low = Infinity, high = 0;
  for (const v of positive) { if (v < low) low = v; if (v > high) high = v; }
  low /= 2; high *= 2;
  const x = scale(low, high, ROOM.left, wide - ROOM.right), y = scale(low, high, tall - ROOM.bottom, ROOM.top);
  g.strokeStyle = colour("--line"); g.lineWidth = 1; g.textAlign = "center";
  for (const e of x.ticks) {
    const v = 10 ** e;
    g.beginPath(); g.moveTo(x(v), ROOM.top); g.lineTo(x(v), tall - ROOM.bottom); g.stroke();
    g.beginPath(); g.moveTo(ROOM.left, y(v)); g.lineTo(wide - ROOM.right, y(v)); g.stroke();
    g.fillText("1e" + e, x(v), tall - ROOM.bottom + 15);
    g.textAlign = "right"; g.fillText("1e" + e, ROOM.left - 5, y(v) + 4); g.textAlign = "center";
  }
  g.fillText("retain score: mean squared activation", (ROOM.left + wide) / 2, tall - 8);
  g.save(); g.translate(13, (tall - ROOM.bottom) / 2); g.rotate(-Math.PI / 2); g.fillText("forget score", 0, 0); g.restore();
  g.strokeStyle = colour("--dot"); g.setLineDash([4, 4]);
  g.beginPath(); g.moveTo(x(low), y(low)); g.lineTo(x(high), y(high)); g.stroke(); g.setLineDash([]);
  const paint = { "": colour("--dot"), irrelevant: colour("--retain"), relevant: colour("--forget"), chosen: colour("--ink") };
  places = data.features.map((f, i) => [x(Math.max(low, data.retain[i])), y(Math.max(low, data.forget[i]))]);
  for (const mark of ["", "irrelevant", "relevant", "chosen"]) {
    g.globalAlpha = mark ? 0.9 : 0.5;
    data.features.forEach((f, i) => {
      if ((data.marks[i] || "") !== mark || !(data.forget[i] > 0 || data.retain[i] > 0)) return;
      shape(g, mark, ...places[i]);
      if (mark === "chosen") { g.strokeStyle = paint.chosen; g.lineWidth = 2.5; g.stroke(); }
      else { g.fillStyle = paint[mark]; g.fill(); }
    });
  }
  g.globalAlpha = 1;
  if (near >= 0 && places[near]) {
    g.strokeStyle = paint.chosen; g.lineWidth = 2; g.beginPath(); g.arc(...places[near], 9, 0, 7); g.stroke();
  }
}

function closest(event) {
  const box = canvas.getBoundingClientRect(), px = event.clientX - box.left, py = event.clientY - box.top;
  let best = 144, found = -1;
  places.forEach(([x, y], i) => {
    if (!(data.forget[i] > 0 || data.retain[i] > 0)) return;
    const d = (x - px) ** 2 + (y - py) ** 2 - (data.marks[i] ? 20 : 0);  // a marked point wins over its neighbours
    if (d < best) { best = d; found = i; }
  });
  return found;
}

canvas.addEventListener("mousemove", (event) => {
  if (!data) return;
  const i = closest(event);
  if (i !== near) { near = i; draw(); }
  tip.hidden = i < 0;
  if (i < 0) return;
  tip.textContent = `feature ${data.features[i]}${data.marks[i] ? " (" + data.marks[i] + ")" : ""}: forget ` +
    `${data.forget[i].toPrecision(2)}, retain ${data.retain[i].toPrecision(2)}; ${(data.tokens[i] || []).join(" · ")}`;
  tip.style.left = Math.min(places[i][0] + 12, Math.max(0, element.clientWidth - tip.offsetWidth - 4)) + "px";
  tip.style.top = places[i][1] + 14 + "px";
});
canvas.addEventListener("mouseleave", () => { near = -1; tip.hidden = true; draw(); });
canvas.addEventListener("click", (event) => {
  const i = data ? closest(event) : -1;
  if (i >= 0) trigger("select", { feature: data.features[i] });
});

function refresh() { data = props.value; near = -1; draw(); }
watch("value", refresh);
new ResizeObserver(draw).observe(element);
new MutationObserver(draw).observe(document.body, { attributes: true, attributeFilter: ["class"] });
refresh();
