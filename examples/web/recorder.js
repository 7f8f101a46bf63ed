// Hand on what the microphone hears, in pieces of one hop or so.

class Recorder extends AudioWorkletProcessor {
  constructor() {
    super();
    this.piece = new Float32Array(256);
    this.length = 0;
  }

  process([[heard]]) {
    for (const x of heard ?? []) {
      this.piece[this.length] = x;
      this.length += 1;
      if (this.length === this.piece.length) {
        this.port.postMessage(this.piece.slice());
        this.length = 0;
      }
    }
    return true;
  }
}

registerProcessor("recorder", Recorder);
