"""The library's pipelines, our own tasks, and the diffusers-like pipeline."""

import inspect
import io
from pathlib import Path

import pytest
import tiny
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DiffusionPipeline, UniPCMultistepScheduler
from make_tiny_transfusion import byte_tokenizer
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import (
    AnyToAnyPipeline,
    AutoModelForMultimodalLM,
    AutoProcessor,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    TextGenerationPipeline,
    pipeline,
)

from transfusion_hf import TransfusionPipeline, TransfusionProcessor

TINY = str(Path(__file__).parent / "fixtures" / "tiny-transfusion")
RED = Image.new("RGB", (8, 8), "red")
QUICK = {"num_inference_steps": 3}
CHAT = [{"role": "user", "content": [{"type": "image", "image": RED}, {"type": "text", "text": "what"}]}]


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="module")
def any_to_any():
    return pipeline("any-to-any", model=TINY)


@pytest.fixture(scope="module")
def model():
    return AutoModelForMultimodalLM.from_pretrained(TINY)


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(TINY)


@pytest.mark.parametrize(
    ("task", "kwargs"),
    [
        ("text-generation", {"text_inputs": "ab"}),
        ("any-to-any", {"text": "ab"}),
        ("text-to-image", {"text": "ab", **QUICK}),
        ("interleaved-generation", {"text": "ab", "generator": seeded(), "do_sample": True, **QUICK}),
    ],
)
def test_stop_strings_saved_with_the_model_stop_its_pipelines(task, kwargs, processor):
    pipe = pipeline(task, model=TINY)
    config = pipe.model.generation_config
    config.sequence_bias = [[[processor.tokenizer.convert_tokens_to_ids("q")], 1e4]]  # writes q after q
    config.stop_strings = ["qq"]
    assert str(pipe(**kwargs)).count("q") == (0 if task == "text-to-image" else 2)
    assert config.stop_strings == ["qq"]


def test_pipelines_take_and_refuse_arguments_of_generate(processor, model):
    pipe, draw, tell = (
        TransfusionPipeline(model, processor), pipeline("text-to-image", model=TINY),
        pipeline("interleaved-generation", model=TINY),
    )  # fmt: skip
    assert len(pipe("a", do_sample=True, num_images_per_prompt=2, **QUICK).images) == 2
    for call in (pipe, draw, tell):
        with pytest.raises(ValueError, match="`num_return_sequences` is decided by the pipeline; use `num_images_per"):
            call("a", num_return_sequences=2)
        with pytest.raises(ValueError, match="`generation_mode` is decided by the pipeline"):
            call("a", generation_mode="text")
    greedy = [str(tell("a", num_images_per_prompt=1, max_new_tokens=12)) for _ in range(2)]
    assert greedy[0] == greedy[1] == str(tell("a", max_new_tokens=12))
    with pytest.raises(ValueError, match="`init_image` as a picture needs one `height` and `width`"):
        draw(["a", "b"], height=[8, 16], init_image=RED, strength=0.5)
    scheduler = DDIMScheduler.from_config(model.noise_scheduler.config)
    assert TransfusionPipeline.from_pretrained(TINY, scheduler=scheduler).scheduler is scheduler


def test_any_to_any_writes(any_to_any, model, processor):
    inputs = processor(text=["<image>what"], images=[RED])
    expected = model.generate(**inputs, max_new_tokens=5, generation_mode="text")[:, inputs["input_ids"].shape[1] :]
    (result,) = any_to_any(
        text="<image>what", images=RED, max_new_tokens=5, generation_mode="text", return_full_text=False
    )
    assert result["generated_text"] == processor.batch_decode(expected, skip_special_tokens=True)[0]


def test_any_to_any_draws_one_image_for_each_prompt(any_to_any, model, processor):
    results = any_to_any(
        text=["draw", "red it"], generation_mode="image", generate_kwargs={**QUICK, "generator": seeded()}
    )
    inputs = processor(text=["draw", "red it"])
    expected = model.generate(**inputs, generation_mode="image", generator=seeded(), **QUICK)
    for result, image in zip(
        results, processor.post_process_multimodal_output(expected, generation_mode="image"), strict=True
    ):
        assert result["generated_image"].tobytes() == image.tobytes()


@pytest.fixture
def eager_to_draw():
    """It would say <BOI> at once."""
    model = AutoModelForMultimodalLM.from_pretrained(TINY)
    model.generation_config.sequence_bias = [[[model.config.image_start_token_id], 1e4]]
    model.model.patch_decoder.register_forward_hook(lambda *_: pytest.fail("it draws"))
    return model


def test_who_asks_for_text_gets_text_whatever_the_model_would_rather_do(eager_to_draw, processor):
    kwargs = {"model": eager_to_draw, "processor": processor, "tokenizer": processor.tokenizer}
    write = pipeline("any-to-any", **kwargs)
    (result,) = write(text="draw", max_new_tokens=4)
    assert result["generated_text"].startswith("draw")
    (result,) = write(text=CHAT, max_new_tokens=4)
    assert result["generated_text"][-1]["role"] == "assistant"
    (result,) = pipeline("text-generation", **kwargs)("draw", max_new_tokens=4)
    assert result["generated_text"].startswith("draw")


def test_other_models_get_the_pipelines_of_the_library(processor):
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    other = LlamaForCausalLM(LlamaConfig(vocab_size=len(processor.tokenizer), **sizes))
    write = pipeline("text-generation", model=other, tokenizer=processor.tokenizer)
    assert type(write) is TextGenerationPipeline
    assert "generated_text" in write("draw", max_new_tokens=2)[0]
    vision = CLIPVisionConfig(**sizes, image_size=4, patch_size=2)
    other = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=other.config))
    assert type(pipeline("any-to-any", model=other, processor=processor)) is AnyToAnyPipeline


def test_the_mode_that_is_asked_for_comes_before_that_of_the_pipeline(model, processor, monkeypatch):
    modes, generate = [], type(model).generate
    monkeypatch.setattr(
        type(model), "generate", lambda *a, **k: modes.append(k["generation_mode"]) or generate(*a, **k)
    )
    interleaved = GenerationConfig(generation_mode="interleaved", max_new_tokens=2)
    kwargs = {"model": model, "processor": processor, "tokenizer": processor.tokenizer}
    any_to_any, write = pipeline("any-to-any", **kwargs), pipeline("text-generation", **kwargs)
    any_to_any("draw", max_new_tokens=2)
    any_to_any("draw", max_new_tokens=2, generate_kwargs={"generation_mode": "interleaved"})
    any_to_any("draw", generation_mode="image", generate_kwargs={**QUICK})
    write("draw", max_new_tokens=2)
    write("draw", generation_config=interleaved)
    assert modes == ["text", "interleaved", "image", "text", "interleaved"]


def test_any_to_any_keeps_prompts_and_answers_together(any_to_any):
    prompts = ["QQQ", "ZZZ"]
    if "candidates_per_input" in inspect.getsource(AnyToAnyPipeline.postprocess):  # older ones know one answer only
        kwargs = {"max_new_tokens": 3, "generate_kwargs": {"num_return_sequences": 2, "do_sample": True}}
        results = any_to_any(text=prompts, **kwargs)
        assert [r["generated_text"][:3] for r in results] == ["QQQ", "QQQ", "ZZZ", "ZZZ"]
    results = any_to_any(text=prompts, max_new_tokens=3, return_tensors=True)
    assert [len(r["generated_token_ids"]) for r in results] == [7, 7]  # <s>, three of the prompt, three new
    chats = [[{"role": "user", "content": [{"type": "text", "text": text}]}] for text in prompts]
    alone = [any_to_any(text=chat, max_new_tokens=3)[0] for chat in chats]
    together = any_to_any(text=chats, max_new_tokens=3, batch_size=2)
    assert [result for (result,) in together] == alone
    kwargs = {"generation_mode": "image", "batch_size": 2, "generate_kwargs": {**QUICK, "generator": seeded()}}
    first, second = (result["generated_image"] for (result,) in any_to_any(text=chats, **kwargs))
    assert first.size == (8, 8) and first.tobytes() != second.tobytes()
    kwargs["generate_kwargs"] = {**QUICK, "num_return_sequences": 2, "do_sample": True}
    with pytest.raises(ValueError, match=r"made 4 images for 2 prompts, but this task returns one per prompt"):
        any_to_any(text=prompts, generation_mode="image", generate_kwargs=kwargs["generate_kwargs"])


@pytest.mark.parametrize("task", ["any-to-any", "image-text-to-text"])
def test_chats_with_images_are_answered(task):
    kwargs = {"generation_mode": "text"} if task == "any-to-any" else {}
    (result,) = pipeline(task, model=TINY)(text=CHAT, max_new_tokens=5, **kwargs)
    question, answer = result["generated_text"]
    assert question == CHAT[0] and answer["role"] == "assistant" and isinstance(answer["content"], str)


def test_text_generation_and_image_text_to_text_work(model):
    (result,) = pipeline("text-generation", model=TINY)("draw", max_new_tokens=5, do_sample=False)
    assert result["generated_text"].startswith("draw") and len(result["generated_text"]) > 4
    results = pipeline("image-text-to-text", model=TINY)(
        text=["<image>what", "<image>this"], images=[RED, RED], max_new_tokens=5
    )
    assert len(results) == 2


def test_text_to_image_returns_pil_images(model, processor):
    draw = pipeline("text-to-image", model=TINY)
    image = draw("draw", generator=seeded(), **QUICK)
    expected = model.generate(**processor(text=["draw"]), generation_mode="image", generator=seeded(), **QUICK)
    assert image.tobytes() == processor.image_processor.postprocess(expected.images[0])[0].tobytes()
    assert [picture.size for picture in draw(["draw", "red"], height=4, width=8, **QUICK)] == [(8, 4)] * 2
    assert isinstance(draw("make <image> blue", images=[RED], **QUICK), Image.Image)


def test_interleaved_generation_returns_what_is_new_in_order(model, processor):
    tell = pipeline("interleaved-generation", model=TINY)
    prompt = "draw <BOI>"
    document = tell(prompt, max_new_tokens=24, **QUICK)
    assert isinstance(document[0], Image.Image) and all(isinstance(part, str) for part in document[1:])
    documents = tell([prompt, "a <image> b"], images=[RED], max_new_tokens=24, max_images=1, **QUICK)
    assert len(documents) == 2 and sum(isinstance(part, Image.Image) for part in documents[0]) == 1


def test_the_diffusers_like_pipeline(model, processor, tmp_path):
    pipe, seen = TransfusionPipeline.from_pretrained(TINY), []
    images = pipe(
        ["draw", "red"], height=8, width=4, guidance_scale=2.0, negative_prompt="blue", num_images_per_prompt=2,
        generator=[torch.Generator().manual_seed(i) for i in range(4)],
        callback_on_step_end=lambda pipe_, step, t, kwargs: seen.append((pipe_ is pipe, step)), progress_bar=False,
        **QUICK,
    ).images  # fmt: skip
    assert [image.size for image in images] == [(4, 8)] * 4 and seen == [(True, 0), (True, 1), (True, 2)]
    negative = processor(text=["blue"])
    expected = model.generate(
        **processor(text=["red"]), generation_mode="image", height=8, width=4, image_guidance_scale=2.0,
        negative_prompt_ids=negative["input_ids"], generator=torch.Generator().manual_seed(3), **QUICK,
    )  # fmt: skip
    (last,) = processor.image_processor.postprocess(expected.images[0])
    difference = torch.tensor(list(images[3].tobytes())).float() - torch.tensor(list(last.tobytes())).float()
    assert difference.abs().max() <= 1  # a rounding of 8 bits
    (tensor,) = pipe("draw", output_type="pt", return_dict=False, generator=seeded(), **QUICK)
    (picture,) = pipe("draw", generator=seeded(), **QUICK).images
    pixels = torch.tensor(list(picture.tobytes())).view(1, 8, 8, 3).permute(0, 3, 1, 2)
    assert (255 * tensor - pixels).abs().max() <= 0.501  # rounded to 8 bits
    edited = pipe(["<image>a", "b<image>"], image=[RED, RED], num_images_per_prompt=2, **QUICK).images
    assert len(edited) == 4
    mask = Image.new("L", (16, 16))
    mask.paste(255, (8, 0, 16, 16))
    (inpainted,) = pipe("draw", init_image=RED, mask_image=mask, **QUICK).images
    pixels = torch.tensor(list(inpainted.tobytes())).view(8, 8, 3)
    assert (pixels[:, :4] == torch.tensor([255, 0, 0])).all() and not (pixels[:, 4:] == pixels[0, 0]).all()
    turned, exif = {}, Image.Exif()  # a photo on its side: left as it is, red in its upper half once upright
    exif[0x0112] = 6
    for name, image in (("init_image", Image.new("RGB", (8, 8), "blue")), ("mask_image", Image.new("L", (8, 8)))):
        upright = image.copy()
        upright.paste("white" if image.mode == "L" else "red", (0, 0, 8, 4))
        buffer = io.BytesIO()
        upright.rotate(90).save(buffer, "png", exif=exif)
        turned[name] = (upright, Image.open(buffer))
    pair = [
        pipe("draw", **{n: i[k] for n, i in turned.items()}, generator=seeded(), **QUICK).images[0] for k in (0, 1)
    ]
    assert pair[0].tobytes() == pair[1].tobytes()
    assert len(pipe(["a", "b"], init_image=[RED, RED], strength=0.4, num_images_per_prompt=2, **QUICK).images) == 4
    with pytest.raises(ValueError, match="`mask_image` and `strength` need an `init_image`"):
        pipe("draw", mask_image=mask)
    pipe.save_pretrained(tmp_path)
    again = TransfusionPipeline.from_pretrained(tmp_path).to("cpu")
    pair = [p("draw", generator=seeded(), **QUICK).images[0].tobytes() for p in (pipe, again)]
    assert pair[0] == pair[1]


@pytest.fixture
def pipe(model, processor):
    return TransfusionPipeline(model, processor)


def test_a_pipeline_of_diffusers_has_its_parts(pipe, model, processor):
    assert isinstance(pipe, DiffusionPipeline) and pipe.device == model.device and pipe.dtype == model.dtype
    assert pipe.components == {"model": model, "processor": processor, "scheduler": pipe.scheduler}
    assert TransfusionPipeline(**pipe.components).scheduler is pipe.scheduler
    drawn = pipe("draw", output_type="pt", generator=seeded(), **QUICK).images
    pipe.enable_model_cpu_offload(device="cpu")
    assert torch.equal(pipe("draw", output_type="pt", generator=seeded(), **QUICK).images, drawn)
    pipe.remove_all_hooks()
    for refused in (pipe.enable_sequential_cpu_offload, pipe.enable_group_offload, pipe.enable_attention_slicing):
        with pytest.raises(
            ValueError, match=r"attention slicing and xFormers do not work .* `enable_model_cpu_offload"
        ):
            refused()
    with pytest.raises(ValueError, match="`enable_vae_tiling` needs a VAE"):
        pipe.enable_vae_tiling()
    with pytest.raises(ValueError, match="clip_skip"):
        pipe("draw", clip_skip=2)


def test_the_vae_of_a_pipeline_works_in_tiles(processor):
    model = tiny.model(vae_config=tiny.VAE, patch_size=1)
    TransfusionPipeline(model, processor).enable_vae_tiling()
    assert model.vae.use_tiling


def test_the_scheduler_of_a_pipeline_is_what_draws(pipe, model, processor):
    kwargs = {"prompt": "draw", "output_type": "latent", "num_inference_steps": 3}
    own = pipe(**kwargs, generator=seeded()).images
    pipe.scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    assert torch.equal(pipe(**kwargs, generator=seeded()).images, own)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    drawn = pipe(**kwargs, generator=seeded()).images
    by_ddim = {"scheduler": DDIMScheduler.from_config(model.noise_scheduler.config), "generation_mode": "image"}
    expected = model.generate(**processor(text=["draw"]), generator=seeded(), **by_ddim, **QUICK)
    assert torch.equal(drawn[0], expected.images[0][0]) and not torch.equal(drawn, own)
    assert torch.equal(pipe(**kwargs, generator=seeded(), scheduler=None).images, own)


def test_the_scheduler_of_a_pipeline_is_that_of_the_generation_config(processor):
    model = AutoModelForMultimodalLM.from_pretrained(TINY)
    model.generation_config.scheduler = "DDIMScheduler"
    pipe = TransfusionPipeline(model, processor)
    assert isinstance(pipe.scheduler, DDIMScheduler)
    expected = model.generate(**processor(text=["draw"]), generator=seeded(), generation_mode="image", **QUICK)
    assert torch.equal(
        pipe("draw", output_type="latent", generator=seeded(), **QUICK).images[0], expected.images[0][0]
    )


def test_diffusers_loads_what_a_pipeline_saves(pipe, tmp_path):
    pipe.scheduler = UniPCMultistepScheduler.from_config(pipe.scheduler.config)
    pipe.save_pretrained(tmp_path)
    expected = pipe("draw", output_type="pt", generator=seeded(), **QUICK).images
    for loader in (DiffusionPipeline, TransfusionPipeline):
        again = loader.from_pretrained(tmp_path)
        assert type(again) is TransfusionPipeline and type(again.scheduler) is UniPCMultistepScheduler
        assert torch.equal(again("draw", output_type="pt", generator=seeded(), **QUICK).images, expected)


def test_a_pipeline_draws_from_the_latents_that_it_is_given(pipe, model):
    noise = torch.randn(2, model.config.latent_channels, *model.config.latent_size, generator=seeded())
    kwargs = {"num_images_per_prompt": 2, "output_type": "latent", **QUICK}
    drawn = pipe("draw", generator=[seeded(), seeded()], latents=noise, scheduler="DDIMScheduler", **kwargs).images
    for i in range(2):
        alone = pipe(
            "draw", latents=noise[i : i + 1], scheduler="DDIMScheduler", **{**kwargs, "num_images_per_prompt": 1}
        )
        # Guidance and the scheduler magnify how a processor rounds one row otherwise than two.
        torch.testing.assert_close(drawn[i], alone.images[0], atol=1e-3, rtol=1e-3)
    own = pipe("draw", generator=seeded(), scheduler="DDIMScheduler", **kwargs).images
    torch.testing.assert_close(drawn, own)  # the first thing that a generator draws
    with pytest.raises(ValueError, match=r"`init_noise` must have shape \(2, 3, 8, 8\), or one row for all"):
        pipe("draw", latents=noise[:, :, :4], **kwargs)


def test_a_callback_ends_the_drawing_of_a_pipeline(pipe):
    seen = []

    def stop_after_two(pipe, step, t, tensors):
        seen.append(tensors["latents"])
        pipe._interrupt = step == 1

    drawn = pipe("draw", callback_on_step_end=stop_after_two, output_type="latent", num_inference_steps=5).images
    assert len(seen) == 2 and pipe._interrupt and torch.equal(drawn, seen[-1])
    pipe(
        "draw",
        callback_on_step_end=lambda *args: seen.append(args[-1]),
        callback_on_step_end_tensor_inputs=[],
        **QUICK,
    )
    assert seen[2:] == [{}] * 3 and not pipe._interrupt
    zeros = pipe(
        "draw", callback_on_step_end=lambda *args: {"latents": 0 * args[-1]["latents"]}, output_type="latent", **QUICK
    )
    assert not zeros.images.any()
    with pytest.raises(ValueError, match="may hold 'latents' alone; got \\['prompt_embeds'\\]"):
        pipe("draw", callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"])


def test_a_pipeline_returns_each_type_of_output(pipe, model):
    kwargs = {"prompt": ["draw", "red"], **QUICK}
    as_pil, as_np, as_pt, latents = (
        pipe(**kwargs, output_type=output_type, generator=seeded()).images
        for output_type in ("pil", "np", "pt", "latent")
    )
    assert as_np.shape == (2, 8, 8, 3) and torch.equal(torch.from_numpy(as_np).permute(0, 3, 1, 2), as_pt)
    assert torch.equal(model.decode_latents(latents).add(1).div(2).clamp(0, 1), as_pt)
    assert as_pil[1].tobytes() == (255 * as_np[1]).round().astype("uint8").tobytes()
    with pytest.raises(ValueError, match="`output_type` must be 'pil', 'np', 'pt' or 'latent'; got 'jpg'"):
        pipe(**kwargs, output_type="jpg")
    with pytest.raises(ValueError, match="`output_type='np'` is one tensor; pass one `height` and `width` for all"):
        pipe(**kwargs, output_type="np", height=[4, 8])


def test_the_progress_bar_of_a_pipeline_is_hidden_on_demand(pipe, capsys):
    for shown in (True, False):
        pipe.set_progress_bar_config(disable=not shown)
        pipe("draw", **QUICK)
        assert ("draw:" in capsys.readouterr().err) == shown


def test_a_pipeline_loads_an_adapter(processor, tmp_path):
    base = AutoModelForMultimodalLM.from_pretrained(TINY)
    adapted = get_peft_model(base, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    kwargs = {"prompt": "draw", "output_type": "pt", **QUICK}
    expected = TransfusionPipeline(adapted, processor)(**kwargs, generator=seeded()).images
    adapted.save_pretrained(tmp_path)
    pipe = TransfusionPipeline.from_pretrained(TINY)
    plain = pipe(**kwargs, generator=seeded()).images
    pipe.load_lora_weights(tmp_path)
    torch.testing.assert_close(pipe(**kwargs, generator=seeded()).images, expected)
    assert not torch.equal(expected, plain)


def test_one_vocabulary_draws_the_same_in_every_pipeline(pipe, model, processor):
    draw = pipeline("text-to-image", model=model, processor=processor)
    mask = Image.new("L", (8, 8))
    mask.paste(255, (4, 0, 8, 8))
    kwargs = {"guidance_scale": 2.0, "negative_prompt": "blue", "num_images_per_prompt": 2, "init_image": RED}
    kwargs |= {"mask_image": mask, **QUICK}
    pair = [one(["draw", "red"], generator=seeded(), **kwargs) for one in (draw, pipe)]
    assert [i.tobytes() for i in pair[0]] == [i.tobytes() for i in pair[1].images] and len(pair[0]) == 4
    assert len(draw("draw", num_images_per_prompt=2, **QUICK)) == 2
    noise = torch.zeros(1, 3, 8, 8)
    assert draw("draw", latents=noise, generator=seeded(), **QUICK).size == (8, 8)
    with pytest.raises(ValueError, match="`num_images_per_prompt` must be at least 1; got 0"):
        draw("draw", num_images_per_prompt=0)


def test_a_chat_template_of_the_tokenizer_gets_images_in_both_directions():
    tokenizer = byte_tokenizer()
    messages = "{% for m in messages %}[{{ m.role }}|{{ m.content }}]{% endfor %}"
    tokenizer.chat_template = messages + "{% if add_generation_prompt %}[bot|{% endif %}"
    model = AutoModelForMultimodalLM.from_pretrained(TINY)
    processor = TransfusionProcessor.for_model(model, tokenizer)
    chat = [
        *CHAT,
        {"role": "assistant", "content": [{"type": "text", "text": "this "}, {"type": "image", "image": RED}]},
        {"role": "user", "content": "thanks"},
    ]
    text = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert text == "[user|<image>what][assistant|this <image>][user|thanks][bot|"
    inputs = processor.apply_chat_template(chat, tokenize=True, return_dict=True, return_tensors="pt")
    assert len(inputs["pixel_values"]) == 2


def test_named_chat_templates_stay_named(tmp_path):
    tokenizer = byte_tokenizer()
    template = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
    tokenizer.chat_template = {"default": template, "tool_use": f"tools {template}"}
    processor = TransfusionProcessor.for_model(AutoModelForMultimodalLM.from_pretrained(TINY), tokenizer)
    processor.save_pretrained(tmp_path)
    chat = [{"role": "user", "content": [{"type": "image", "image": RED}, {"type": "text", "text": "What?"}]}]
    for one in (processor, TransfusionProcessor.from_pretrained(tmp_path)):
        assert one.apply_chat_template(chat) == "[<image>What?]"
        assert one.apply_chat_template(chat, chat_template="tool_use") == "tools [<image>What?]"


def test_images_and_markers_must_be_as_many(model, processor):
    pipe = TransfusionPipeline(model, processor)
    for prompt, number, message in (
        ("draw", 2, "`text` has 0 markers <image> but `images` holds 1 images"),
        ("<image><image>", 2, "`text` has 2 markers <image> but `images` holds 1 images"),
        ("<image>", 0, "`num_images_per_prompt` must be at least 1; got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            pipe(prompt, image=RED, num_images_per_prompt=number)


def test_a_pipeline_may_lie_in_a_subfolder(pipe, tmp_path):
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.save_pretrained(tmp_path / "inner")
    again = TransfusionPipeline.from_pretrained(str(tmp_path), subfolder="inner")
    assert type(again.scheduler) is DDIMScheduler
    pair = [p("draw", generator=seeded(), **QUICK).images[0].tobytes() for p in (pipe, again)]
    assert pair[0] == pair[1]
