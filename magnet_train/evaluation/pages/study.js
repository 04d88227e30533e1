"use strict";
const main = document.querySelector("main");
const byId = id => document.getElementById(id);
const study = main.dataset.study, playedShare = Number(main.dataset.played);
const message = byId("message");
let trials = [...document.querySelectorAll(".trial")];
let rater = "";
let state = {place: 0, ratings: {}, seconds: {}, played: {}};

// The order is drawn from study and rater, so that it is the rater's own, and the same when they come back.
function randomNumbers(seed) {
  let x = 2166136261;
  for (const byte of new TextEncoder().encode(seed)) x = Math.imul(x ^ byte, 16777619);
  return () => {
    x = (x + 0x9e3779b9) | 0;
    let y = Math.imul(x ^ (x >>> 16), 0x85ebca6b);
    y = Math.imul(y ^ (y >>> 13), 0xc2b2ae35);
    return ((y ^ (y >>> 16)) >>> 0) / 4294967296;
  };
}

function shuffled(list, random) {
  list = [...list];
  for (let i = list.length - 1; i > 0; i--) {
    const j = Math.floor(random() * (i + 1));
    [list[i], list[j]] = [list[j], list[i]];
  }
  return list;
}

const cardsOf = trial => [...trial.querySelectorAll(".clip")];
const slidersOf = card => [...card.querySelectorAll("input")];
const storageName = () => `magnet_train listening ${study} ${rater}`;

function keep() {
  try {
    localStorage.setItem(storageName(), JSON.stringify(state));
  } catch {
    say("This browser does not store ratings: keep this window open until you have saved the file.");
  }
}

function recall() {
  try {
    state = JSON.parse(localStorage.getItem(storageName())) ?? state;
  } catch { /* nothing was kept, or it is broken: begin anew */ }
}

function say(words) {
  message.textContent = words;
}

function show(slider, value) {
  slider.value = value;
  slider.classList.remove("untouched");
  slider.removeAttribute("aria-valuetext");
  slider.parentElement.querySelector("output").textContent = value;
}

// What is still missing before a clip counts; "" when nothing is.
function missing(card) {
  const id = card.dataset.id;
  if (!state.played[id]) return "not played to its end yet";
  const open = slidersOf(card).filter(slider => !state.ratings[id]?.[slider.dataset.question]);
  return open.length ? `${open.length} of ${slidersOf(card).length} ratings missing` : "";
}

function refresh(card) {
  const lack = missing(card), line = card.querySelector(".state");
  line.textContent = lack || "played and rated";
  line.classList.toggle("done", !lack);
}

function setUp(card) {
  const id = card.dataset.id, audio = card.querySelector("audio");
  let last = null;
  function listen() {
    const now = audio.currentTime;
    // A jump is no listening.
    if (last !== null && now > last && now - last < 1.5) state.seconds[id] = (state.seconds[id] ?? 0) + now - last;
    last = now;
    let covered = 0;
    for (let i = 0; i < audio.played.length; i++) covered += audio.played.end(i) - audio.played.start(i);
    if (!state.played[id] && covered >= playedShare * audio.duration) {
      state.played[id] = true;
      state.seconds[id] = Math.max(state.seconds[id] ?? 0, covered);
      say("");
      keep();
    }
    refresh(card);
  }
  audio.addEventListener("play", () => {
    for (const other of document.querySelectorAll("audio")) if (other !== audio) other.pause();
    last = audio.currentTime;
  });
  audio.addEventListener("timeupdate", listen);
  audio.addEventListener("seeking", () => { last = null; });
  for (const event of ["pause", "ended"]) audio.addEventListener(event, () => { listen(); keep(); });
  for (const slider of slidersOf(card)) {
    const rate = () => {
      (state.ratings[id] ??= {})[slider.dataset.question] = Number(slider.value);
      show(slider, slider.value);
      refresh(card);
      say("");
      keep();
    };
    slider.addEventListener("input", rate);
    // A click on the very middle moves nothing and is a rating all the same; so is Enter or space.
    slider.addEventListener("click", rate);
    slider.addEventListener("keydown", event => {
      if (event.key === "Enter" || event.key === " ") { event.preventDefault(); rate(); }
    });
    const kept = state.ratings[id]?.[slider.dataset.question];
    if (kept) show(slider, kept);
  }
  refresh(card);
}

function go(place) {
  for (const audio of document.querySelectorAll("audio")) audio.pause();
  state.place = place;
  keep();
  const isOver = place >= trials.length;
  trials.forEach((trial, i) => { trial.hidden = i !== place; });
  byId("finish").hidden = !isOver;
  byId("back").disabled = place === 0;
  byId("next").hidden = isOver;
  byId("save").textContent = isOver ? "Save the ratings (CSV)" : "Save ratings so far (CSV)";
  byId("save").classList.toggle("main", isOver);
  document.querySelector("progress").value = Math.min(place, trials.length);
  const screen = isOver ? byId("finish") : trials[place];
  for (const audio of screen.querySelectorAll("audio")) audio.preload = "auto";
  screen.querySelector("h2").focus({preventScroll: true});
  scrollTo(0, 0);
}

function begin() {
  rater = byId("rater").value.normalize("NFC").replace(/\s+/g, " ").trim();
  if (!rater) {
    say("Please enter your name or id first.");
    return byId("rater").focus();
  }
  say("");
  recall();
  const random = randomNumbers(`${study} ${rater}`);
  trials = shuffled(trials, random);
  trials.forEach((trial, i) => {
    trial.querySelector("h2").textContent = `Screen ${i + 1} of ${trials.length}`;
    shuffled(cardsOf(trial), random).forEach((card, j) => {
      card.querySelector("h3").textContent = `Clip ${j + 1}`;
      card.querySelector("audio").setAttribute("aria-label", `Clip ${j + 1}`);
      trial.append(card);
      setUp(card);
    });
  });
  byId("welcome").hidden = true;
  byId("progress").hidden = byId("steps").hidden = false;
  go(Math.min(state.place, trials.length));
}

function next() {
  const card = cardsOf(trials[state.place]).find(missing);
  if (!card) {
    say("");
    return go(state.place + 1);
  }
  say(`${card.querySelector("h3").textContent}: ${missing(card)}.`);
  const open = slidersOf(card).find(slider => slider.classList.contains("untouched"));
  (state.played[card.dataset.id] && open ? open : card.querySelector("audio")).focus();
}

function cell(value) {
  const words = String(value);
  return /[",\r\n]/.test(words) ? `"${words.replaceAll('"', '""')}"` : words;
}

function table() {
  const rows = [["rater", "trial", "blinded_id", "question", "rating", "seconds_listened", "order"]];
  let order = 0;
  for (const trial of trials) for (const card of cardsOf(trial)) {
    order += 1;
    const id = card.dataset.id;
    if (!state.played[id]) continue;
    for (const {dataset: {question}} of slidersOf(card)) {
      const rating = state.ratings[id]?.[question];
      if (rating) rows.push([rater, trial.dataset.trial, id, question, rating, state.seconds[id].toFixed(2), order]);
    }
  }
  return rows;
}

function save() {
  const rows = table();
  if (rows.length === 1) return say("No clip is played and rated yet.");
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([rows.map(row => row.map(cell).join(",") + "\r\n").join("")], {type: "text/csv"}));
  link.download = `ratings_${study}_${rater.replace(/[^\p{L}\p{N}]+/gu, "-")}.csv`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
  say(`${rows.length - 1} ratings saved as ${link.download}.`);
}

byId("begin").addEventListener("click", begin);
byId("rater").addEventListener("keydown", event => { if (event.key === "Enter") begin(); });
byId("back").addEventListener("click", () => { say(""); go(state.place - 1); });
byId("next").addEventListener("click", next);
byId("save").addEventListener("click", save);
addEventListener("pagehide", () => { if (rater) keep(); });
