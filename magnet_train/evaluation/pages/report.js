"use strict";
// Viridis at equal distances, dark first.
const VIRIDIS = [[68, 1, 84], [65, 68, 135], [42, 120, 142], [34, 168, 132], [122, 209, 81], [253, 231, 37]];
const GIVEN = -1;

function viridis(share) {
  const place = share * (VIRIDIS.length - 1);
  const i = Math.min(Math.floor(place), VIRIDIS.length - 2);
  return VIRIDIS[i].map((low, c) => low + (VIRIDIS[i + 1][c] - low) * (place - i));
}

// Neighbouring codes are unrelated, so their colours are far apart: hues a golden section from one another.
function codeColour(code) {
  const hue = (code * 0.618034) % 1 * 6, light = 0.42 + 0.28 * ((code * 0.754878) % 1);
  return [5, 3, 1].map(n => {
    const k = (n + hue) % 6;
    return 255 * (light - 0.55 * Math.min(light, 1 - light) * Math.max(-1, Math.min(k - 1, 3 - k, 1)));
  });
}

function int16(base64) {
  const bytes = Uint8Array.from(atob(base64), c => c.charCodeAt(0));
  return new Int16Array(bytes.buffer);
}

function setUpGrids(box) {
  const canvases = [...box.querySelectorAll("canvas")];
  const rows = Number(box.dataset.rows), columns = Number(box.dataset.columns);
  const codes = box.dataset.codes ? int16(box.dataset.codes) : null;
  const order = box.dataset.order ? int16(box.dataset.order) : null;
  // Passes run through the stages: the first pass of a codebook follows the last of the one below it.
  const firstPass = [0];
  const steps = [];
  for (let row = 0; order && row < rows; row++) {
    steps.push(Math.max(...order.subarray(row * columns, (row + 1) * columns)) + 1);
    firstPass.push(firstPass[row] + steps[row]);
  }
  const undecided = getComputedStyle(document.documentElement).getPropertyValue("--undecided").trim();
  const blank = [1, 3, 5].map(i => parseInt(undecided.slice(i, i + 2), 16));

  function draw(shown) {
    for (const canvas of canvases) {
      const image = new ImageData(columns, rows);
      for (let i = 0; i < rows * columns; i++) {
        const row = Math.floor(i / columns);
        const isShown = !order || order[i] === GIVEN || firstPass[row] + order[i] < shown;
        let colour = blank;
        if (isShown && canvas.dataset.shows === "codes") colour = codeColour(codes[i] & 0xffff);
        else if (isShown && order[i] === GIVEN) colour = [150, 150, 150];
        else if (isShown) colour = viridis(steps[row] > 1 ? order[i] / (steps[row] - 1) : 0);
        image.data.set([...colour, 255], 4 * i);
      }
      canvas.width = columns;
      canvas.height = rows;
      canvas.style.height = `${Math.max(14 * rows, 28)}px`;
      canvas.getContext("2d").putImageData(image, 0, 0);
    }
  }

  const slider = box.querySelector("input[type=range]");
  if (!slider) return draw(0);
  const output = box.querySelector("output"), button = box.querySelector("button");
  const total = firstPass[rows];
  let timer = 0;
  function show(shown) {
    draw(shown);
    const stage = Math.max(0, firstPass.findLastIndex(first => first < shown));
    const where = shown ? `pass ${shown} of ${total}, codebook ${stage + 1}` : "before the first pass";
    output.textContent = where;
    slider.setAttribute("aria-valuetext", where);
  }
  function stop() {
    clearInterval(timer);
    timer = 0;
    button.textContent = "Animate";
  }
  slider.max = total;
  slider.value = total;
  slider.addEventListener("input", () => { stop(); show(Number(slider.value)); });
  button.addEventListener("click", () => {
    if (timer) return stop();
    if (Number(slider.value) >= total) slider.value = 0;
    button.textContent = "Stop";
    timer = setInterval(() => {
      slider.value = Number(slider.value) + 1;
      show(Number(slider.value));
      if (Number(slider.value) >= total) stop();
    }, 150);
  });
  show(total);
}

for (const details of document.querySelectorAll("details.grids")) {
  details.addEventListener("toggle", () => {
    if (details.open && !details.dataset.ready) {
      details.dataset.ready = "yes";
      setUpGrids(details.querySelector(".grids-data"));
    }
  });
}

document.addEventListener("play", event => {
  for (const other of document.querySelectorAll("audio")) if (other !== event.target) other.pause();
  follow(event.target);
}, true);

function follow(audio) {
  const head = audio.closest(".clip").querySelector(".spectrogram i");
  const duration = audio.duration || 1;
  head.style.opacity = audio.currentTime > 0 ? 1 : 0;
  head.style.left = `${100 * audio.currentTime / duration}%`;
  if (!audio.paused) requestAnimationFrame(() => follow(audio));
}

for (const picture of document.querySelectorAll(".spectrogram")) {
  const audio = picture.closest(".clip").querySelector("audio");
  audio.addEventListener("seeked", () => follow(audio));
  picture.addEventListener("click", event => {
    const box = picture.getBoundingClientRect();
    const share = (event.clientX - box.left) / box.width;
    const seek = () => { audio.currentTime = share * audio.duration; audio.play(); };
    if (audio.readyState) return seek();
    audio.addEventListener("loadedmetadata", seek, {once: true});
    audio.load();
  });
}

for (const button of document.querySelectorAll("button[data-plays]")) {
  const audio = document.getElementById(button.dataset.plays).querySelector("audio");
  const name = button.getAttribute("aria-label");
  button.addEventListener("click", () => audio.paused ? audio.play() : audio.pause());
  for (const [event, sign, verb] of [["play", "❚❚", "Pause"], ["pause", "▶", "Play"]])
    audio.addEventListener(event, () => {
      button.textContent = sign;
      button.setAttribute("aria-label", name.replace(/^\w+/, verb));
    });
}
