"use strict";
// Reads latents from a safetensors file: 8 bytes of length, a JSON header, then the tensors' bytes.
const Safetensors = (() => {
  const DTYPES = { F32: ["float32", 4], F16: ["float16", 2], BF16: ["bfloat16", 2] };

  // Returns {bytes, shape, dtype, height, width}: the raw bytes as the server takes them, sizes or null. Throws Error.
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
    if (!Array.isArray(shape) || (shape.length !== 3 && shape.length !== 4)) {
      throw new Error(
        `latents: got shape (${shape}); expected packed latents (batch, patches, 64) or unpacked ones ` +
          "(batch, 16, height/8, width/8).",
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

  return { latents };
})();
