// The page: a file in, two sounds and two spectrograms out.

import { analyse, enhance, load } from "./stream.js";

const at = (id) => document.getElementById(id);
const say = (text) => { at("status").textContent = text; };
let busy = false;

const model = await load("model").catch((error) => {
  say(`The model could not be loaded: ${error.message}`);
  throw error;
});
const { sample_rate: rate, latency_ms: latency } = model.about;
say(`Ready: ${rate} Hz, ${latency.toFixed(0)} ms of latency in a stream.`);

at("file").addEventListener("change", () => show(at("file").files[0]));
for (const [event, over] of [["dragover", true], ["dragleave", false], ["drop", false]]) {
  at("drop").addEventListener(event, (dragged) => {
    dragged.preventDefault();
    at("drop").classList.toggle("over", over);
    if (event === "drop") show(dragged.dataTransfer.files[0]);
  });
}

async function show(file) {
  if (!file || busy) return;
  busy = true;
  try {
    const before = await samplesOf(file);
    const begun = performance.now();
    const after = await enhance(model, before, (share) => say(`${(100 * share).toFixed(0)} %`));
    const seconds = (performance.now() - begun) / 1000, length = before.length / rate;
    at("results").hidden = false;
    picture(at("before"), before);
    picture(at("after"), after);
    at("play-before").src = URL.createObjectURL(wav(before));
    at("play-after").src = URL.createObjectURL(wav(after));
    say(`${length.toFixed(1)} s in ${seconds.toFixed(1)} s: real-time factor `
      + `${(seconds / length).toFixed(2)} on one thread of this browser.`);
  } catch (error) {
    say(`${file.name} could not be enhanced: ${error.message}`);
  } finally {
    busy = false;
  }
}

// Decode any audio that the browser knows, at the model's rate, channels averaged.
async function samplesOf(file) {
  const context = new OfflineAudioContext(1, 1, rate);
  const audio = await context.decodeAudioData(await file.arrayBuffer());
  const mono = new Float32Array(audio.length);
  for (let c = 0; c < audio.numberOfChannels; c++) {
    audio.getChannelData(c).forEach((x, i) => { mono[i] += x / audio.numberOfChannels; });
  }
  return mono;
}

// Draw levels from -80 to 0 dB under the loudest possible, low frequencies at the bottom.
function picture(canvas, samples) {
  const { n_fft, hop_length: hop } = model.about, bins = (n_fft >> 1) + 1;
  const frames = Math.max(1, Math.floor((samples.length - n_fft) / hop) + 1);
  const padded = new Float32Array(Math.max(samples.length, n_fft));
  padded.set(samples);
  canvas.width = frames;
  canvas.height = bins;
  const image = new ImageData(frames, bins);
  for (let k = 0; k < frames; k++) {
    const c = analyse(padded, k * hop, model.about);
    for (let f = 0; f < bins; f++) {
      const level = 20 * Math.log10(Math.hypot(c[2 * f], c[2 * f + 1]) / (n_fft / 4) + 1e-9);
      const share = Math.min(1, Math.max(0, 1 + level / 80));
      const pixel = ((bins - 1 - f) * frames + k) * 4;
      image.data.set([255 * share ** 1.5, 200 * share ** 3, 120 * share * (1 - share) * 4, 255], pixel);
    }
  }
  canvas.getContext("2d").putImageData(image, 0, 0);
}

// 16-bit PCM in a WAV, for the audio elements.
function wav(samples) {
  const view = new DataView(new ArrayBuffer(44 + 2 * samples.length));
  const text = (offset, letters) => [...letters].forEach(
    (letter, i) => view.setUint8(offset + i, letter.charCodeAt(0)));
  text(0, "RIFF");
  view.setUint32(4, 36 + 2 * samples.length, true);
  text(8, "WAVEfmt ");
  [[16, 16, 4], [20, 1, 2], [22, 1, 2], [24, rate, 4], [28, 2 * rate, 4], [32, 2, 2], [34, 16, 2]]
    .forEach(([offset, value, bytes]) => (bytes === 4
      ? view.setUint32(offset, value, true) : view.setUint16(offset, value, true)));
  text(36, "data");
  view.setUint32(40, 2 * samples.length, true);
  samples.forEach((x, i) => view.setInt16(
    44 + 2 * i, Math.round(32767 * Math.min(1, Math.max(-1, x))), true));
  return new Blob([view], { type: "audio/wav" });
}
