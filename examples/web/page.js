// The page: a file or the microphone in, two sounds and two spectrograms out.

import { Stream, analyse, enhance, joined, load } from "./stream.js";

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
    const before = await samplesOf(file), begun = performance.now();
    const after = await enhance(model, before, (share) => say(`${(100 * share).toFixed(0)} %`));
    results(before, after, (performance.now() - begun) / 1000);
  } catch (error) {
    say(`${file.name} could not be enhanced: ${error.message}`);
  } finally {
    busy = false;
  }
}

function results(before, after, seconds) {
  const length = before.length / rate;
  at("results").hidden = false;
  for (const [id, samples] of [["before", before], ["after", after]]) {
    picture(at(id), samples);
    at(`play-${id}`).src = URL.createObjectURL(wav(samples));
  }
  say(`${length.toFixed(1)} s in ${seconds.toFixed(1)} s: real-time factor `
    + `${(seconds / length).toFixed(2)} on one thread of this browser.`);
}

// The microphone: enhanced while it records, heard at once with headphones, shown at the end.
let stopRecording = null;
at("microphone").addEventListener("click", () => (stopRecording ? stopRecording() : record()));

async function record() {
  if (busy) return;
  busy = true;
  let context, source;
  try {
    const processing = { echoCancellation: false, noiseSuppression: false, autoGainControl: false };
    source = await navigator.mediaDevices.getUserMedia({ audio: processing });
    context = new AudioContext({ sampleRate: rate });
    await context.audioWorklet.addModule("recorder.js");
    const recorder = new AudioWorkletNode(context, "recorder", { numberOfOutputs: 0 });
    const stream = new Stream(model), before = [], after = [], asked = at("listen").checked;
    let seconds = 0, due = 0, work = Promise.resolve();
    recorder.port.onmessage = ({ data }) => {
      before.push(data);
      work = work.then(async () => {
        const begun = performance.now(), ready = await stream.push(data);
        seconds += (performance.now() - begun) / 1000;
        after.push(ready);
        if (asked && ready.length) due = play(context, ready, due);
      });
    };
    context.createMediaStreamSource(source).connect(recorder);
    at("microphone").textContent = "Stop";
    const begun = performance.now();
    const clock = setInterval(() => say(`Recording: ${((performance.now() - begun) / 1000)
      .toFixed(0)} s, real-time factor ${(seconds * rate / Math.max(1, stream.taken)).toFixed(2)}`), 200);
    await new Promise((resolve) => { stopRecording = resolve; });
    clearInterval(clock);
    recorder.port.onmessage = null;
    source.getTracks().forEach((track) => track.stop());
    say("Finishing ...");
    await work;
    if (!before.length) throw new Error("nothing was recorded");
    results(joined(before), joined([...after, await stream.flush()]), seconds);
  } catch (error) {
    say(`The microphone cannot be used: ${error.message}`);
  } finally {
    source?.getTracks().forEach((track) => track.stop());
    await context?.close();
    at("microphone").textContent = "Use the microphone";
    stopRecording = null;
    busy = false;
  }
}

// Play samples when those before them end; a twentieth of a second is kept in hand.
function play(context, samples, due) {
  const buffer = context.createBuffer(1, samples.length, rate), node = context.createBufferSource();
  buffer.copyToChannel(samples, 0);
  node.buffer = buffer;
  node.connect(context.destination);
  const begin = due > context.currentTime ? due : context.currentTime + 0.05;
  node.start(begin);
  return begin + samples.length / rate;
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
