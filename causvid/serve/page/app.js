// The page: it shows blocks at its own pace, says which it has shown, and tells the server what the person wants.

import { Chart } from "./chart.js";

const by = (id) => document.getElementById(id);
const token = new URLSearchParams(location.search).get("token");
const query = token === null ? "" : `?token=${encodeURIComponent(token)}`;
const [PICTURE, FRAMES] = [1, 2]; // first byte of what is sent as bytes
const MOST_BYTES = 4 << 20; // of frames in a message
const chart = new Chart(by("chart"), by("facts"));
const screen = by("screen").getContext("2d");

let socket = null;
let viewer = null;
let size = null; // of the stream: height, width, frames that its next block takes, and frames that wait for it
let shown = []; // frames that wait to be shown: {pixels, number} or the end of a block
let stage = 0; // which start of the stream a block belongs to
let paused = false;
let prompts = {};
let feed = null; // a webcam or a video file that is being restyled
let number = 0;

const say = (message) => socket?.readyState === WebSocket.OPEN && socket.send(JSON.stringify(message));
const state = (text) => { by("state").textContent = text; };
const complain = (text) => { by("message").textContent = text; };

function fill(id, values) {
  by(id).replaceChildren(...values.map((value) => new Option(value, value)));
}

function connect() {
  socket = new WebSocket(`${location.protocol === "https:" ? "wss" : "ws"}://${location.host}/stream${query}`);
  socket.binaryType = "arraybuffer";
  socket.onmessage = ({ data }) => (typeof data === "string" ? told(JSON.parse(data)) : block(data));
  socket.onclose = () => {
    size = null;
    stopFeed();
    state("not connected");
    setTimeout(connect, 2000);
  };
}

function told(message) {
  if (message.type === "hello") {
    viewer = message.viewer;
    prompts = message.prompts;
    fill("checkpoint", message.checkpoints);
    fill("cache", message.caches);
    fill("policy", message.policies);
    by("policy").value = "cut"; // obeyed where the others are not (docs/streaming.md)
    fill("how", message.hows);
    by("download").href = `viewers/${viewer}/video.mp4${query}`;
    by("record").href = `viewers/${viewer}/session${query}`;
    by("prompt").value ||= prompts[message.checkpoints[0]];
    start();
  } else if (message.type === "started") {
    size = { height: message.height, width: message.width, wanted: message.wanted, waiting: 0 };
    stage = message.stage;
    by("fps").value = message.fps;
    by("steps").placeholder = `${message.steps}, as trained`;
    by("screen").width = size.width;
    by("screen").height = size.height;
    shown = [];
    branches([0], 0);
    state("streaming");
  } else if (message.type === "branch") {
    branches(message.branches, message.branch);
    if (size) size.waiting = 0;
    shown = shown.filter((frame) => frame.end);
  } else if (message.type === "event") {
    if (message.kind === "prompt") complain("");
  } else if (message.type === "worker") {
    state(message.message);
  } else if (message.type === "error") {
    complain(message.message);
    if (size) size.waiting = 0; // what was sent may have been left out
    if (message.fatal) state("stopped");
  }
}

function branches(names, active) {
  by("branches").replaceChildren(...(names.length < 2 ? [] : names.map((name) => {
    const button = document.createElement("button");
    button.textContent = `branch ${name}`;
    button.setAttribute("aria-pressed", name === active);
    button.onclick = () => say({ type: "branch", branch: name });
    return button;
  })));
}

function block(data) {
  const length = new DataView(data).getUint32(0, true);
  const facts = JSON.parse(new TextDecoder().decode(new Uint8Array(data, 4, length)));
  if (facts.stage !== stage || size === null) return;
  const bytes = size.height * size.width * 3;
  for (let i = 0; i < facts.frames; i++) {
    shown.push({ rgb: new Uint8Array(data, 4 + length + i * bytes, bytes) });
  }
  shown.push({ end: facts.number });
  size.wanted = facts.wanted;
  size.waiting = facts.waiting;
  number = facts.block;
  chart.add(facts.row, facts.summary, facts.cache_bytes);
  if (!paused && !feed) state(`block ${facts.block}: ${facts.prompt}`);
}

let due = 0;
function show(now) {
  requestAnimationFrame(show);
  const period = 1000 / Math.max(1, Number(by("fps").value) || 8);
  if (paused || now < due) return;
  due = Math.max(now, due + period);
  let frame = shown.shift();
  while (frame?.end !== undefined) {
    say({ type: "ack", number: frame.end });
    frame = shown.shift();
  }
  if (!frame || !size || frame.rgb.length !== size.height * size.width * 3) return;
  const image = screen.createImageData(size.width, size.height);
  for (let from = 0, to = 0; from < frame.rgb.length; from += 3, to += 4) {
    image.data[to] = frame.rgb[from];
    image.data[to + 1] = frame.rgb[from + 1];
    image.data[to + 2] = frame.rgb[from + 2];
    image.data[to + 3] = 255;
  }
  screen.putImageData(image, 0, 0);
}

function start() {
  stopFeed();
  complain("");
  chart.clear();
  pause(false);
  say({
    type: "start", prompt: by("prompt").value, checkpoint: by("checkpoint").value, cache: by("cache").value,
    steps: by("steps").value ? Number(by("steps").value) : null, seed: Number(by("seed").value) || 0, how: by("how").value,
  });
  state("starting");
}

function pause(on) {
  paused = on;
  by("pause").textContent = on ? "Go on" : "Pause";
  if (size) say({ type: "pause", on });
}

async function sendPicture() {
  const file = by("image").files[0];
  if (!file) return;
  const content = new Uint8Array(await file.arrayBuffer());
  const message = new Uint8Array(content.length + 1);
  message[0] = PICTURE;
  message.set(content, 1);
  chart.clear();
  stopFeed();
  socket.send(message);
}

// A feed is played here and its frames are sent, cropped to the stream's shape, as many as each block takes.
async function startFeed(video, stop) {
  stopFeed();
  await video.play();
  const canvas = new OffscreenCanvas(size.width, size.height);
  const g = canvas.getContext("2d", { willReadFrequently: true });
  feed = { video, stop, frames: [], timer: null };
  const mine = feed;
  say({ type: "video", on: true, strength: Number(by("strength").value) });
  by("feed-stop").disabled = false;
  state("restyling");
  feed.timer = setInterval(() => {
    if (!size || paused || mine !== feed) return;
    if (video.ended) return stopFeed();
    const cover = Math.max(size.width / video.videoWidth, size.height / video.videoHeight);
    const [w, h] = [video.videoWidth * cover, video.videoHeight * cover];
    g.drawImage(video, (size.width - w) / 2, (size.height - h) / 2, w, h);
    const rgba = g.getImageData(0, 0, size.width, size.height).data;
    const rgb = new Uint8Array(size.width * size.height * 3);
    for (let from = 0, to = 0; from < rgba.length; from += 4, to += 3) rgb.set(rgba.subarray(from, from + 3), to);
    feed.frames.push(rgb);
    if (feed.frames.length < Math.min(size.wanted, Math.max(1, Math.floor(MOST_BYTES / rgb.length)))) return;
    const unseen = shown.filter((frame) => frame.end !== undefined).length;
    if (unseen >= 3 || size.waiting >= 2 * size.wanted) { // page or model is behind: the feed skips
      feed.frames = [];
      return;
    }
    size.waiting += feed.frames.length;
    const message = new Uint8Array(1 + feed.frames.length * rgb.length);
    message[0] = FRAMES;
    feed.frames.forEach((frame, index) => message.set(frame, 1 + index * rgb.length));
    feed.frames = [];
    socket.send(message);
  }, 1000 / Math.max(1, Number(by("fps").value) || 8));
}

function stopFeed() {
  if (!feed) return;
  clearInterval(feed.timer);
  feed.video.pause();
  feed.stop();
  feed = null;
  by("feed-stop").disabled = true;
  say({ type: "video", on: false });
}

function playing(source) {
  const video = document.createElement("video");
  video.muted = true;
  video.playsInline = true;
  if (source instanceof MediaStream) video.srcObject = source;
  else video.src = source;
  return video;
}

by("prompt-form").onsubmit = (event) => {
  event.preventDefault();
  if (size) say({ type: "prompt", text: by("prompt").value, policy: by("policy").value });
  else start();
};
by("start").onclick = start;
by("pause").onclick = () => pause(!paused);
by("fork").onclick = () => say({ type: "fork", seed: Math.floor(Math.random() * 2 ** 31) });
by("back").onclick = () => say({ type: "fork", block: Math.max(0, number - 4), seed: Math.floor(Math.random() * 2 ** 31) });
by("image").onchange = sendPicture;
by("strength").oninput = () => {
  by("strength-value").textContent = Number(by("strength").value).toFixed(2);
  if (feed) say({ type: "video", on: true, strength: Number(by("strength").value) });
};
by("checkpoint").onchange = () => { by("prompt").value = prompts[by("checkpoint").value]; start(); };
by("cache").onchange = start;
by("steps").onchange = start;
by("feed-stop").onclick = stopFeed;
by("camera").onclick = async () => {
  try {
    const stream = await navigator.mediaDevices.getUserMedia({ video: true });
    await startFeed(playing(stream), () => stream.getTracks().forEach((track) => track.stop()));
  } catch (error) {
    complain(`no webcam: ${error.message}`);
  }
};
by("video").onchange = async () => {
  const file = by("video").files[0];
  if (!file || !size) return;
  const url = URL.createObjectURL(file);
  try {
    await startFeed(playing(url), () => URL.revokeObjectURL(url));
  } catch (error) {
    complain(`this browser can't play that file: ${error.message}`);
  }
};
window.addEventListener("resize", () => chart.draw());
connect();
requestAnimationFrame(show);
