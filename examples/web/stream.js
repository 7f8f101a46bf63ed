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

// Enhance samples at the model's rate; as many come out. Calls progress(share) now and then.
export async function enhance(model, samples, progress = () => {}, noise = gaussian) {
  const { about, session } = model;
  const { n_fft, hop_length: hop, delay, alpha, beta } = about;
  const bins = (n_fft >> 1) + 1, buffer = about.times.length, past = n_fft >> 1;
  let state = begin(model, bins, buffer, noise);
  // Frames are centred; silence follows until the last sample has left the buffer.
  const frames = Math.ceil(samples.length / hop) + 1 + delay;
  const padded = new Float32Array(frames * hop + n_fft);
  padded.set(samples, past);
  const sum = new Float32Array(padded.length), envelope = new Float32Array(padded.length);
  const names = session.inputNames;
  for (let k = 0; k < frames; k++) {
    const noisy = compress(analyse(padded, k * hop, about), alpha, beta);
    const feeds = {
      [names[0]]: new ort.Tensor("float32", noisy, [1, bins, 2]),
      [names[1]]: new ort.Tensor("float32", noise(bins * (buffer + 1) * 2), [1, bins, buffer + 1, 2]),
    };
    state.forEach((tensor, i) => { feeds[names[2 + i]] = tensor; });
    const out = await session.run(feeds);
    state = session.outputNames.slice(1).map((name) => out[name]);
    const first = (k - delay + 1) * hop; // the frame that comes out entered delay - 1 hops ago
    if (first >= 0) synthesise(expand(out[session.outputNames[0]].data, alpha, beta), first);
    if (k % 25 === 0) {
      progress(k / frames);
      await new Promise((resolve) => setTimeout(resolve)); // let the page draw
    }
  }
  return sum.map((x, i) => (envelope[i] > 1e-8 ? x / envelope[i] : x))
    .slice(past, past + samples.length);

  function synthesise(spectrum, first) {
    const frame = inverse(spectrum, n_fft);
    for (let n = 0; n < n_fft; n++) {
      sum[first + n] += frame[n] * about.window[n];
      envelope[first + n] += about.window[n] ** 2;
    }
  }
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
