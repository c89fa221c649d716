"""Trains a LocalDiT on captioned pictures; `python train.py --help` lists the options."""

from __future__ import annotations

from localdit.training.options import parse_args


def main() -> None:
    """Train: find the data, load the models, take the steps, save the pipeline."""
    args = parse_args()

    import numpy as np
    import torch
    from accelerate import Accelerator, DistributedDataParallelKwargs
    from accelerate.utils import set_seed
    from diffusers.optimization import get_scheduler
    from torch.nn.attention import sdpa_kernel
    from torch.utils.data import DataLoader, Dataset
    from tqdm import tqdm

    from localdit.training import components, encoding, objective
    from localdit.training import data_old as data
    from localdit.training.ema import ExponentialMovingAverage
    from localdit.training.run import Metrics, RunFolder, make_pipeline, require_finite

    samples = data.find_samples(args.data_root)
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        log_with="wandb" if args.use_wandb else None,
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
    device = accelerator.device
    rank, num_processes = accelerator.process_index, accelerator.num_processes
    bf16 = accelerator.mixed_precision == "bf16"
    accelerator.print(
        f"{len(samples):,} pictures; {num_processes} processes on {device.type}; "
        f"{args.batch_size} x {num_processes} x {args.gradient_accumulation_steps} pictures to a "
        "step"
    )
    run = RunFolder(args.output)
    if accelerator.is_main_process:
        run.create(vars(args))
    settings = {name: str(value) for name, value in vars(args).items()}
    accelerator.init_trackers("localdit", config=settings)

    # The models start the same in every process; then each has a randomness of its own.
    set_seed(args.seed)
    encoders = components.load_encoders(
        args, torch.bfloat16 if device.type == "cuda" else torch.float32
    )
    transformer = components.load_transformer(args)
    components.check_fit(transformer, encoders)
    encoders.to(device)
    transformer.to(device)
    ema = ExponentialMovingAverage(transformer, args.ema_decay)
    set_seed(args.seed, device_specific=True)
    rng = np.random.default_rng([args.seed, rank])
    generator = torch.Generator(device).manual_seed(int(rng.integers(2**63)))

    pictures = data.PictureDataset(samples, args.image_size)
    dataset: Dataset = pictures
    encode_captions: encoding.EncodeCaptions = encoding.CaptionEncoder(
        encoders.tokenizer, encoders.text_encoder, args.max_caption_length
    )
    if args.cache_latents:
        dataset = encoding.LatentCache(
            pictures, encoders.vae, args.num_workers, bf16, rank, num_processes
        )
        captions = ["", *(caption for sample in samples for caption in sample.captions)]
        encode_captions = encoding.CaptionCache(captions, encode_captions, rank, num_processes)
        encoders.to("cpu")
    loader = DataLoader(
        dataset,
        batch_sampler=data.ShuffledBatches(
            len(samples), args.batch_size, args.seed, rank, num_processes
        ),
        num_workers=0 if args.cache_latents else args.num_workers,
        pin_memory=device.type == "cuda",
    )
    batches = iter(loader)

    noise_scheduler = objective.training_scheduler(args.prediction_type)
    num_timesteps = noise_scheduler.config.num_train_timesteps
    optimizer = torch.optim.AdamW(
        transformer.parameters(),
        lr=args.learning_rate,
        weight_decay=args.weight_decay,
        fused=device.type in ("cpu", "cuda"),
    )
    lr_schedule = get_scheduler(
        "cosine" if args.lr_schedule == "cosine" else "constant_with_warmup",
        optimizer,
        num_warmup_steps=args.warmup_steps,
        num_training_steps=args.max_train_steps,
    )
    model, optimizer = accelerator.prepare(transformer, optimizer)
    attention_kernels = components.attention_kernels(device, accelerator.mixed_precision)
    added_conditions = (
        objective.size_conditions(args.image_size, args.batch_size, device)
        if transformer.use_additional_conditions
        else None
    )
    pipeline = make_pipeline(encoders, ema.model, objective.sampling_scheduler(noise_scheduler))

    metrics = Metrics(args.batch_size * num_processes * args.gradient_accumulation_steps)
    steps = range(1, args.max_train_steps + 1)
    progress = tqdm(steps, "Training", disable=not accelerator.is_main_process)
    for step in progress:
        losses = []
        for _ in range(args.gradient_accumulation_steps):
            with accelerator.accumulate(model):
                indices, latents = next(batches)
                latents = latents.to(device, non_blocking=True)
                if not args.cache_latents:
                    latents = encoding.encode_pictures(encoders.vae, latents, bf16)
                text, text_mask = encode_captions(
                    data.draw_captions(samples, indices.tolist(), args.token_dropout, rng)
                )
                noise = torch.randn(latents.shape, generator=generator, device=device)
                timesteps = objective.sample_timesteps(
                    len(latents), num_timesteps, args.timestep_sampling, generator
                )
                with sdpa_kernel(attention_kernels):
                    prediction = model(
                        noise_scheduler.add_noise(latents, noise, timesteps),
                        encoder_hidden_states=text.to(device, torch.float32),
                        encoder_attention_mask=text_mask.to(device),
                        timestep=timesteps,
                        added_cond_kwargs=added_conditions,
                        return_dict=False,
                    )[0]
                target = objective.training_target(noise_scheduler, latents, noise, timesteps)
                weights = (
                    objective.min_snr_weights(noise_scheduler, timesteps, args.min_snr_gamma)
                    if args.min_snr_gamma
                    else None
                )
                loss = objective.denoising_loss(prediction, target, weights)
                accelerator.backward(loss)
            losses.append(loss.detach())

        grad_norm = accelerator.clip_grad_norm_(model.parameters(), args.gradient_clip)
        mean_loss = accelerator.reduce(torch.stack(losses).mean(), reduction="mean")
        require_finite(step, mean_loss, grad_norm, scaled=accelerator.scaler is not None)
        optimizer.step()
        lr_schedule.step()
        optimizer.zero_grad()
        ema.update(transformer)

        metrics.add(mean_loss.item(), grad_norm.item())
        if step % args.log_interval == 0 or step == args.max_train_steps:
            line = {
                "step": step,
                "learning_rate": lr_schedule.get_last_lr()[0],
                **metrics.collect(),
            }
            accelerator.log(line, step=step)
            if accelerator.is_main_process:
                run.log(line)
                progress.set_postfix(
                    loss=f"{line['loss']:.4f}", images_per_s=f"{line['images_per_second']:.1f}"
                )
        if accelerator.is_main_process:
            if step % args.save_interval == 0:
                run.save_checkpoint(ema.model, step)
            if args.validation_prompts and step % args.validation_interval == 0:
                encoders.to(device)
                run.save_pictures(
                    pipeline, args.validation_prompts, args.image_size, step, args.seed
                )

    if accelerator.is_main_process:
        run.save_pipeline(pipeline)
    accelerator.end_training()


if __name__ == "__main__":
    main()
