// A marginroute bundle: its manifest, its files checked by their sha256, and its network in onnxruntime.

import { createHash } from "node:crypto";
import { readFileSync } from "node:fs";
import { join } from "node:path";
import * as ort from "onnxruntime-node";
import { readNpz } from "./npz.mjs";

const FORMAT = 1;

export class Bundle {
  constructor(folder) {
    this.folder = folder;
    this.manifest = JSON.parse(readFileSync(join(folder, "manifest.json"), "utf8"));
    if (this.manifest.format !== FORMAT) throw new Error(`format ${this.manifest.format}; this reads ${FORMAT}`);
    if (this.manifest.learned !== "residual") throw new Error("the bundle holds a heuristic and no network");
    this.spec = this.manifest.spec;
  }

  /** The bytes of a file that the manifest lists; refuses any other than was exported. */
  read(name) {
    const bytes = readFileSync(join(this.folder, name));
    const sha256 = createHash("sha256").update(bytes).digest("hex");
    if (sha256 !== this.manifest.sha256[name]) throw new Error(`${name} does not match the sha256 in the manifest`);
    return bytes;
  }

  arrays(name) {
    return readNpz(this.read(name));
  }

  async open() {
    this.session = await ort.InferenceSession.create(this.read("policy.onnx"));
    return this;
  }

  /** Flat observations (B, D) -> what the network takes: candidates | context | advice | legal, row by row. */
  split(observation) {
    const [rows, width] = observation.shape;
    const f = this.spec.candidate.length;
    const g = this.spec.context.length;
    const c = (width - g) / (f + 2);
    const parts = { candidate: [c * f, [rows, c, f]], context: [g, [rows, g]], advice: [c, [rows, c]], legal: [c, [rows, c]] };
    const feeds = {};
    let from = 0;
    for (const [name, [length, shape]] of Object.entries(parts)) {
      const values = new Float32Array(rows * length);
      for (let row = 0; row < rows; row++) {
        const start = row * width + from;
        values.set(observation.data.subarray(start, start + length), row * length);
      }
      feeds[name] =
        name === "legal"
          ? new ort.Tensor("bool", Uint8Array.from(values, (x) => (x > 0.5 ? 1 : 0)), shape)
          : new ort.Tensor("float32", values, shape);
      from += length;
    }
    return feeds;
  }

  /** Logits (B, C) and choices (B,) of flat observations. */
  async decide(observation) {
    const feeds = this.split(observation);
    const { logits, choice } = await this.session.run(feeds);
    return { logits: logits.data, choice: choice.data, legal: feeds.legal.data, candidates: logits.dims[1] };
  }
}
