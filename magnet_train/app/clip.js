"use strict";
// <clip-view>: a spectrogram with its player. With data-edits, regions are dragged on it; the text
// field of that id holds them, as START:END in seconds, and is the other way to change them.
const KEY_STEP_S = 0.5, EDGE_PX = 8, CLICK_PX = 4;
let lastView = null;

// Gradio may replace attributes and children in place, so nothing of them is kept.
class ClipView extends HTMLElement {
  connectedCallback() {
    for (const event of ["seeked", "play", "pause"]) this.addEventListener(event, () => this.follow(), true);
    this.addEventListener("pointerdown", event => this.press(event));
    this.addEventListener("keydown", event => this.key(event));
    this.timer = setInterval(() => this.draw(), 200);
    this.draw();
  }
  disconnectedCallback() { clearInterval(this.timer); }
  get figure() { return this.querySelector("figure"); }
  get audio() { return this.querySelector("audio"); }
  get seconds() { return Number(this.dataset.seconds); }

  follow() {
    const head = this.figure.querySelector("i");
    head.style.left = `${100 * this.audio.currentTime / this.seconds}%`;
    head.style.opacity = this.audio.currentTime > 0 ? 1 : 0;
    if (!this.audio.paused && this.isConnected) requestAnimationFrame(() => this.follow());
  }
  toggle() { this.audio.paused ? this.audio.play() : this.audio.pause(); }
  seek(seconds) { this.audio.currentTime = Math.min(Math.max(seconds, 0), this.seconds); }
  secondsAt(event) {
    const box = this.figure.getBoundingClientRect();
    return Math.min(Math.max((event.clientX - box.left) / box.width, 0), 1) * this.seconds;
  }

  get field() { return document.querySelector(`#${this.dataset.edits} :is(input, textarea)`); }
  get regions() {
    const found = (this.field?.value || "").matchAll(/([\d.]*):([\d.]*)/g);
    return [...found].map(([, start, end]) => [Number(start || 0), end ? Number(end) : this.seconds]);
  }
  set regions(regions) {
    const merged = [];
    for (const [start, end] of regions.sort((a, b) => a[0] - b[0])) {
      const last = merged.at(-1);
      if (last && start <= last[1]) last[1] = Math.max(last[1], end);
      else merged.push([start, end]);
    }
    const short = seconds => String(Math.round(seconds * 100) / 100);
    this.field.value = merged.map(([start, end]) => `${short(start)}:${short(end)}`).join(" ");
    this.field.dispatchEvent(new Event("input", {bubbles: true}));
    this.draw();
  }
  draw() {
    if (!this.dataset.edits || this.isDragging) return;
    const text = this.field?.value ?? "", box = this.figure.querySelector(".regions");
    if (text === box.dataset.drawn) return;
    box.dataset.drawn = text;
    this.show(this.regions);
  }
  show(regions) {
    const box = this.figure.querySelector(".regions");
    box.replaceChildren(...regions.map(([start, end], i) => {
      const part = document.createElement("span"), button = document.createElement("button");
      part.style.left = `${100 * start / this.seconds}%`;
      part.style.width = `${100 * (end - start) / this.seconds}%`;
      button.textContent = "×";
      button.setAttribute("aria-label", `Remove the region from ${start} to ${end} seconds`);
      button.addEventListener("click", () => { this.regions = this.regions.filter((_, j) => j !== i); });
      part.append(button);
      return part;
    }));
  }

  // A drag marks a region, or moves an edge that it starts at; a click plays from there.
  press(event) {
    if (event.button || !event.target.closest("figure") || event.target.closest("button")) return;
    const first = event.clientX, box = this.figure.getBoundingClientRect();
    const reach = EDGE_PX * this.seconds / box.width;
    let start = this.secondsAt(event), others = this.dataset.edits ? this.regions : [], moved = false;
    const at = others.findIndex(ends => ends.some(end => Math.abs(end - start) < reach));
    if (at >= 0) {
      const [from, to] = others.splice(at, 1)[0];
      start = Math.abs(from - start) < Math.abs(to - start) ? to : from;
    }
    const drag = event => {
      moved ||= Math.abs(event.clientX - first) > CLICK_PX;
      const end = this.secondsAt(event);
      return [...others, [Math.min(start, end), Math.max(start, end)]];
    };
    const move = event => { const regions = drag(event); if (moved && this.dataset.edits) this.show(regions); };
    const stop = () => {
      this.isDragging = false;
      this.removeEventListener("pointermove", move);
      this.removeEventListener("pointerup", up);
      this.removeEventListener("pointercancel", cancel);
    };
    const cancel = () => { stop(); this.show(this.regions); };
    const up = event => {
      stop();
      const regions = drag(event);
      if (moved && this.dataset.edits) { this.regions = regions; return; }
      this.seek(this.secondsAt(event));
      if (!this.dataset.edits) this.audio.play();
    };
    this.isDragging = true;
    this.setPointerCapture(event.pointerId);
    this.addEventListener("pointermove", move);
    this.addEventListener("pointerup", up);
    this.addEventListener("pointercancel", cancel);
  }

  key(event) {
    if (event.target !== this.figure || !this.dataset.edits) return;
    if (event.ctrlKey || event.altKey || event.metaKey) return;
    const now = this.audio.currentTime, others = this.regions;
    const step = event.shiftKey ? KEY_STEP_S / 10 : KEY_STEP_S;
    const at = others.findIndex(([start, end]) => start <= now && now <= end);
    if (event.key === "ArrowLeft") this.seek(now - step);
    else if (event.key === "ArrowRight") this.seek(now + step);
    else if (event.key === "[") this.opened = now;
    else if (event.key === "]" && this.opened !== undefined && this.opened !== now) {
      this.regions = [...others, [Math.min(this.opened, now), Math.max(this.opened, now)]];
      this.opened = undefined;
    } else if (["Delete", "Backspace"].includes(event.key) && at >= 0) {
      this.regions = others.filter((_, i) => i !== at);
    } else return;
    event.preventDefault();
  }
}
customElements.define("clip-view", ClipView);

const views = () => [...document.querySelectorAll("clip-view")].filter(view => view.offsetParent);
const current = () => (lastView?.offsetParent ? lastView : views()[0]);

// One clip plays at a time. Another one of its group continues at the same position: A/B.
document.addEventListener("play", event => {
  const view = event.target.closest("clip-view");
  if (!view) return;
  for (const other of document.querySelectorAll("clip-view")) {
    if (other === view) continue;
    if (!other.audio.paused && other.dataset.group === view.dataset.group) view.seek(other.audio.currentTime);
    other.audio.pause();
  }
  lastView = view;
}, true);

document.addEventListener("keydown", event => {
  const inField = event.target.closest("input, textarea, select, button, audio, summary, [role=listbox], [role=tab]");
  if (inField || event.ctrlKey || event.altKey || event.metaKey || !current()) return;
  const group = views().filter(view => view.dataset.group === current().dataset.group);
  const chosen = event.key === " " ? current() : group[Number(event.key) - 1];
  if (!chosen) return;
  event.preventDefault();
  if (event.key === " ") return chosen.toggle();
  if (chosen.audio.paused) chosen.audio.play();
});
