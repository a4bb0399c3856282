// Reproduces the parity vectors of a bundle: node parity.mjs BUNDLE

import { Bundle } from "./bundle.mjs";

const TOLERANCE = 1e-5;

if (process.argv.length !== 3) {
  console.error("usage: node parity.mjs BUNDLE");
  process.exit(2);
}
try {
  const bundle = await new Bundle(process.argv[2]).open();
  const { observation, logits: expected } = bundle.arrays("parity.npz");
  const { logits, choice, legal, candidates } = await bundle.decide(observation);
  let worst = 0;
  for (let i = 0; i < logits.length; i++) {
    if (legal[i]) worst = Math.max(worst, Math.abs(logits[i] - expected.data[i]));
    else if (logits[i] !== -Infinity) throw new Error(`candidate ${i % candidates} is not legal and has a logit`);
  }
  let same = 0;
  for (let row = 0; row < choice.length; row++) {
    const at = (c) => (legal[row * candidates + c] ? expected.data[row * candidates + c] : -Infinity);
    const best = [...Array(candidates).keys()].reduce((a, c) => (at(c) > at(a) ? c : a), 0);
    same += best === Number(choice[row]);
  }
  const names = bundle.manifest.layout.names;
  console.log(`${bundle.manifest.policy}, ${names.length} candidates, ${bundle.spec.candidate.length} features each`);
  console.log(`logits differ by ${worst.toExponential(1)} at most; ${same} of ${choice.length} choices are the same`);
  console.log(`first choice: ${names[Number(choice[0])]}`);
  if (!(worst <= TOLERANCE) || same !== choice.length) throw new Error(`not within ${TOLERANCE}`);
} catch (error) {
  console.error(`error: ${error.message}`);
  process.exit(1);
}
