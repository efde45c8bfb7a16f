// transformers.js in Node: calls on standard input, answers on standard output.
import fs from 'node:fs';
import {
    AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer, Tensor, env, load_image,
} from '@huggingface/transformers';

env.allowRemoteModels = false;
const folder = process.argv[2];
const calls = JSON.parse(fs.readFileSync(0, 'utf-8'));
const integers = (rows) => new Tensor('int64', BigInt64Array.from(rows.flat().map(BigInt)), [rows.length, rows[0].length]);
const numbers = (tensor) => tensor.tolist().map((row) => row.map(Number));
const { model_type: type } = JSON.parse(fs.readFileSync(`${folder}/config.json`, 'utf-8'));
const model = await (type === 'llava' ? AutoModelForImageTextToText : AutoModelForCausalLM).from_pretrained(folder);

async function answer(call) {
    if (call.chat && !call.picture) {
        const tokenizer = await AutoTokenizer.from_pretrained(folder);
        const text = tokenizer.apply_chat_template(call.chat, { tokenize: false, add_generation_prompt: true });
        return [text, tokenizer.encode(text)];
    }
    if (call.picture) {
        const processor = await AutoProcessor.from_pretrained(folder);
        const text = processor.apply_chat_template(call.chat, { add_generation_prompt: true });
        const inputs = await processor(await load_image(call.picture), text, { add_special_tokens: false });
        return numbers(await model.generate(inputs));
    }
    const given = { input_ids: integers(call.rows), max_new_tokens: call.new };
    if (call.pixels) given.pixel_values = new Tensor('float32', Float32Array.from(call.pixels.data), call.pixels.shape);
    if (call.mask) given.attention_mask = integers(call.mask);
    return numbers(await model.generate(given));
}

const answers = [];
for (const call of calls) answers.push(await answer(call));
console.log(JSON.stringify(answers));
