"use strict";
// Reads and writes latents in safetensors files: 8 bytes with the header's length, a JSON header, and the tensors.
const Safetensors = (() => {
  const PATCHES = 128; // how many channels FLUX.2's latents have in 2x2 patches
  const CHANNELS = [4, 16, 32, PATCHES]; // how many channels unpacked latents may have
  const FEATURES = [16, 64, 128]; // how many features a token of packed latents may have
  const DTYPES = { F32: ["float32", 4], F16: ["float16", 2], BF16: ["bfloat16", 2] };

  // Returns {bytes, shape, dtype, height, width}: the raw bytes as the server takes them, and the size in pixels or
  // null where the file does not tell it. Throws an Error whose message can be shown.
  function latents(buffer) {
    const { header, start } = readHeader(buffer);
    const names = Object.keys(header).filter((name) => name !== "__metadata__");
    const name = names.includes("latents") ? "latents" : names.length === 1 ? names[0] : null;
    if (name === null) {
      throw new Error(`latents: the file holds ${list(names)}; expected a tensor named "latents", or one tensor only.`);
    }
    const tensor = header[name];
    const [dtype, itemsize] = DTYPES[tensor.dtype] ?? [];
    if (!dtype) throw new Error(`latents: got ${tensor.dtype} values; expected F32, F16 or BF16.`);
    const shape = tensor.shape;
    if (!Array.isArray(shape) || shape.length < 2 || shape.length > 5) {
      throw new Error(
        `latents: got shape (${shape}); expected packed latents (batch, patches, 64) or unpacked ones ` +
          "(batch, 16, height/8, width/8); one image may leave its batch out.",
      );
    }
    const [from, to] = tensor.data_offsets ?? [];
    const size = shape.reduce((product, dimension) => product * dimension, itemsize);
    if (!(from >= 0 && to - from === size && start + to <= buffer.byteLength)) {
      throw new Error("latents: the file is cut short or damaged: its header promises more bytes than it holds.");
    }
    const metadata = header.__metadata__ ?? {};
    return {
      bytes: new Uint8Array(buffer, start + from, size),
      shape,
      dtype,
      height: pixels(metadata.height),
      width: pixels(metadata.width),
    };
  }

  // Returns how latents are sent image by image: {count, each: the shape of one image's latents, packed}. Returns null
  // where this may be the shape of C packed images or of one image with C channels, and no size tells which it is.
  function layout(shape, height, width) {
    const whole = (packed) => ({ count: 1, each: shape, packed });
    const rows = (packed) => ({ count: shape[0], each: [1, ...shape.slice(1)], packed });
    if (shape.length === 2) return whole(true);
    if (shape.length === 5) return rows(false);
    if (shape.length === 4) return shape[1] === 1 ? whole(false) : rows(false); // one frame of one image, or a batch
    if (!CHANNELS.includes(shape[0])) return rows(true);
    if (!FEATURES.includes(shape[2])) return whole(false);
    if (height === null || width === null) return null;
    const scale = shape[0] === PATCHES ? 16 : 8;
    return height === scale * shape[1] && width === scale * shape[2] ? whole(false) : rows(true);
  }

  // Returns a file with float32 latents, as bytes, whose picture has this size in pixels.
  function file(bytes, shape, height, width) {
    const tensor = { dtype: "F32", shape, data_offsets: [0, bytes.length] };
    const metadata = { height: String(height), width: String(width) };
    const header = new TextEncoder().encode(JSON.stringify({ __metadata__: metadata, latents: tensor }));
    const padded = new Uint8Array(Math.ceil(header.length / 8) * 8).fill(32); // so that the values begin at a multiple of 8
    padded.set(header);
    const length = new DataView(new ArrayBuffer(8));
    length.setBigUint64(0, BigInt(padded.length), true);
    return new Blob([length.buffer, padded, bytes], { type: "application/octet-stream" });
  }

  function readHeader(buffer) {
    const broken = () => new Error("latents: this is no safetensors file.");
    if (buffer.byteLength < 8) throw broken();
    const length = Number(new DataView(buffer).getBigUint64(0, true));
    if (length < 2 || length > buffer.byteLength - 8) throw broken();
    try {
      return { header: JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 8, length))), start: 8 + length };
    } catch {
      throw broken();
    }
  }

  const pixels = (text) => (/^\d{1,6}$/.test(text ?? "") ? Number(text) : null);
  const list = (names) => (names.length ? names.slice(0, 8).map((name) => `"${name}"`).join(", ") : "no tensor");

  return { latents, layout, file };
})();
