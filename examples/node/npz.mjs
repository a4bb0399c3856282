// Arrays of an npz archive: a zip whose members are stored as they are, each an npy file (numpy.lib.format).

const STORED = 0;
const TYPES = {
  "<f4": Float32Array,
  "<f8": Float64Array,
  "<i8": BigInt64Array,
  "|b1": Uint8Array,
};

/** Array by name: { shape, data }, row by row. */
export function readNpz(bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const arrays = {};
  let at = directory(view);
  while (at + 46 <= view.byteLength && view.getUint32(at, true) === 0x02014b50) {
    const method = view.getUint16(at + 10, true);
    const size = view.getUint32(at + 24, true);
    const nameLength = view.getUint16(at + 28, true);
    const start = view.getUint32(at + 42, true);
    const name = text(bytes, at + 46, nameLength);
    if (method !== STORED) throw new Error(`${name} is compressed; a bundle's arrays are not`);
    const body = start + 30 + view.getUint16(start + 26, true) + view.getUint16(start + 28, true);
    arrays[name.replace(/\.npy$/, "")] = readNpy(bytes.subarray(body, body + size));
    at += 46 + nameLength + view.getUint16(at + 30, true) + view.getUint16(at + 32, true);
  }
  return arrays;
}

/** Where the zip's directory begins, as its last record says. */
function directory(view) {
  for (let at = view.byteLength - 22; at >= 0; at--) {
    if (view.getUint32(at, true) === 0x06054b50) return view.getUint32(at + 16, true);
  }
  throw new Error("no npz archive");
}

function readNpy(bytes) {
  if (text(bytes, 1, 5) !== "NUMPY") throw new Error("no npy array");
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const wide = bytes[6] > 1;
  const length = wide ? view.getUint32(8, true) : view.getUint16(8, true);
  const begin = wide ? 12 : 10;
  const header = text(bytes, begin, length);
  const kind = /'descr': '([^']+)'/.exec(header)[1];
  if (!(kind in TYPES) || /'fortran_order': True/.test(header)) throw new Error(`array of type ${kind}`);
  const shape = /'shape': \(([^)]*)\)/.exec(header)[1].split(",").filter((x) => x.trim()).map(Number);
  const data = bytes.slice(begin + length); // a copy, so that it is aligned
  return { shape, data: new TYPES[kind](data.buffer, 0, shape.reduce((a, b) => a * b, 1)) };
}

function text(bytes, at, length) {
  return new TextDecoder("latin1").decode(bytes.subarray(at, at + length));
}
