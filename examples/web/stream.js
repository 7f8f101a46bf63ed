// What run.py does, in a browser: frames, overlap-add, state and noise around one ONNX graph.

import * as ort from "./node_modules/onnxruntime-web/dist/ort.wasm.bundle.min.mjs";

ort.env.wasm.numThreads = 1;
ort.env.wasm.wasmPaths = new URL("./node_modules/onnxruntime-web/dist/", import.meta.url).href;
const SMALLEST = 1.1754944e-38; // of float32

// Load a folder that `diffbuf export` wrote: what is in stream.json, the graph, its first state.
export async function load(folder) {
  const about = await (await fetch(`${folder}/stream.json`)).json();
  const session = await ort.InferenceSession.create(`${folder}/hop.onnx`);
  const flat = new Float32Array(await (await fetch(`${folder}/start.bin`)).arrayBuffer());
  const start = [];
  let at = 0;
  for (const { shape } of session.inputMetadata.slice(2)) { // after noisy and noise
    const dims = [1, ...shape.slice(1)];
    const size = dims.reduce((a, b) => a * b);
    start.push({ dims, data: flat.subarray(at, at + size) });
    at += size;
  }
  return { about, session, start };
}

// CN(0, 1): pairs of variance 1/2 (Box and Muller 1958).
export function gaussian(count) {
  const z = new Float32Array(count);
  for (let i = 0; i < count; i += 2) {
    const radius = Math.sqrt(-Math.log(1 - Math.random()));
    const angle = 2 * Math.PI * Math.random();
    z[i] = radius * Math.cos(angle);
    z[i + 1] = radius * Math.sin(angle);
  }
  return z;
}

// One stream: as many samples come out of push and flush as went in, as from run.py's Stream.
export class Stream {
  constructor(model, noise = gaussian) {
    const { n_fft, times } = model.about;
    this.model = model;
    this.noise = noise;
    this.bins = (n_fft >> 1) + 1;
    this.state = begin(model, this.bins, times.length, noise);
    this.waiting = new Float32Array(n_fft >> 1); // frames are centred
    this.sum = new Float32Array(n_fft); // of windowed output frames
    this.envelope = new Float32Array(n_fft); // of their squared windows
    this.frames = this.taken = 0;
    this.given = -(n_fft >> 1); // below 0: samples before the first one, left out
  }

  // Take samples at the model's rate; give those that are ready.
  async push(samples) {
    const { n_fft, hop_length: hop, delay } = this.model.about, ready = [];
    this.taken += samples.length;
    this.waiting = joined([this.waiting, samples]);
    while (this.waiting.length >= n_fft) {
      const clean = await this.enhance(this.waiting);
      this.waiting = this.waiting.slice(hop);
      this.frames += 1;
      if (this.frames >= delay) ready.push(this.overlapAdd(clean)); // before, it is the buffer's noise
    }
    const out = joined(ready), early = Math.max(-this.given, 0);
    this.given += out.length;
    return out.subarray(early);
  }

  // End the stream: give what is still inside.
  async flush() {
    const { hop_length: hop } = this.model.about, ready = [];
    const { taken } = this, missing = taken - Math.max(this.given, 0);
    while (this.given < taken) ready.push(await this.push(new Float32Array(hop)));
    return joined(ready).subarray(0, missing);
  }

  // Take the newest frame through the network; give the clean one that leaves the buffer.
  async enhance(samples) {
    const { bins, model: { about, session } } = this, { alpha, beta, times } = about;
    const names = session.inputNames, frames = times.length + 1;
    const noisy = compress(analyse(samples, 0, about), alpha, beta);
    const feeds = {
      [names[0]]: new ort.Tensor("float32", noisy, [1, bins, 2]),
      [names[1]]: new ort.Tensor("float32", this.noise(bins * frames * 2), [1, bins, frames, 2]),
    };
    this.state.forEach((tensor, i) => { feeds[names[2 + i]] = tensor; });
    const out = await session.run(feeds);
    this.state = session.outputNames.slice(1).map((name) => out[name]);
    return inverse(expand(out[session.outputNames[0]].data, alpha, beta), about.n_fft);
  }

  // Add a frame; give the hop of samples that no later frame changes.
  overlapAdd(frame) {
    const { hop_length: hop, window } = this.model.about;
    window.forEach((w, n) => {
      this.sum[n] += frame[n] * w;
      this.envelope[n] += w * w;
    });
    const done = this.sum.slice(0, hop)
      .map((x, n) => (this.envelope[n] > 1e-8 ? x / this.envelope[n] : x));
    for (const kept of [this.sum, this.envelope]) {
      kept.copyWithin(0, hop);
      kept.fill(0, kept.length - hop);
    }
    return done;
  }
}

export function joined(pieces) {
  const all = new Float32Array(pieces.reduce((length, piece) => length + piece.length, 0));
  let at = 0;
  for (const piece of pieces) {
    all.set(piece, at);
    at += piece.length;
  }
  return all;
}

// Enhance a whole signal. Calls progress(share) now and then.
export async function enhance(model, samples, progress = () => {}, noise = gaussian) {
  const stream = new Stream(model, noise), second = model.about.sample_rate, ready = [];
  for (let i = 0; i < samples.length; i += second) {
    ready.push(await stream.push(samples.subarray(i, i + second)));
    progress(i / samples.length);
    await new Promise((resolve) => setTimeout(resolve)); // let the page draw
  }
  return joined([...ready, await stream.flush()]);
}

// The state of a stream that begins: the last frames of its first tensor are noise.
function begin({ about, start }, bins, buffer, noise) {
  const z = noise(bins * buffer * 2);
  return start.map(({ dims, data }, number) => {
    const copy = data.slice();
    for (let f = 0; number === 0 && f < bins; f++) {
      for (let i = 0; i < 2 * buffer; i++) {
        const at = (f * dims[2] + dims[2] - buffer) * 2 + i;
        copy[at] = about.start_sigma[i >> 1] * z[f * 2 * buffer + i];
      }
    }
    return new ort.Tensor("float32", copy, dims);
  });
}

// |c| becomes beta |c|^alpha, and back; in place, [real, imaginary, real, ...].
function compress(c, alpha, beta) {
  return scaled(c, (size) => beta * size ** (alpha - 1));
}

function expand(c, alpha, beta) {
  return scaled(c, (size) => (size / beta) ** (1 / alpha - 1) / beta);
}

function scaled(c, factor) {
  for (let i = 0; i < c.length; i += 2) {
    const by = factor(Math.max(Math.hypot(c[i], c[i + 1]), SMALLEST));
    c[i] *= by;
    c[i + 1] *= by;
  }
  return c;
}

// A plain Fourier sum: n_fft need not be a power of two, and the network costs fifty times as much.
const tables = new Map();
function table(n) {
  if (!tables.has(n)) {
    const turn = (f) => Float64Array.from({ length: n }, (_, i) => f((2 * Math.PI * i) / n));
    tables.set(n, { cos: turn(Math.cos), sin: turn(Math.sin) });
  }
  return tables.get(n);
}

export function analyse(samples, first, { n_fft: n, window }) {
  const { cos, sin } = table(n), out = new Float32Array(2 * ((n >> 1) + 1));
  for (let k = 0; 2 * k <= n; k++) {
    let re = 0, im = 0;
    for (let i = 0, at = 0; i < n; i++, at += at + k < n ? k : k - n) {
      const x = samples[first + i] * window[i];
      re += x * cos[at];
      im -= x * sin[at];
    }
    out[2 * k] = re;
    out[2 * k + 1] = im;
  }
  return out;
}

function inverse(c, n) {
  const { cos, sin } = table(n), out = new Float64Array(n);
  for (let k = 0; 2 * k <= n; k++) {
    const twice = k === 0 || 2 * k === n ? 1 : 2; // for the other half of the spectrum
    for (let i = 0, at = 0; i < n; i++, at += at + k < n ? k : k - n) {
      out[i] += (twice * (c[2 * k] * cos[at] - c[2 * k + 1] * sin[at])) / n;
    }
  }
  return out;
}
