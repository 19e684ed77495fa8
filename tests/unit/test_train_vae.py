"""The VAE's trainings: what their crops show, what a VAE that goes on is held to, and how one of other layers takes over."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders import autoencoder_kl_wan
from torch import nn

from muralist.data import world
from muralist.errors import UserError
from muralist.nn.single_frame import single_frame_convolutions
from muralist.train import miniature
from muralist.train.loop import Length
from muralist.train.miniature import FURTHER_VAE, TAUGHT_VAE, new_vae, train_decoder, train_vae
from muralist.train.objectives import reconstruction
from muralist.train.objectives.reconstruction import Reconstruction, ReconstructionConfig, band_error, still
from muralist.types import Grid


def test_single_frame_convolutions_change_nothing_but_time():
    vae, x = new_vae(), torch.rand(1, 3, 1, 64, 96) * 2 - 1
    original = autoencoder_kl_wan.WanCausalConv3d.forward
    with torch.no_grad():
        expected = vae.decode(vae.encode(x).latent_dist.mean).sample
        with single_frame_convolutions():
            got = vae.decode(vae.encode(x).latent_dist.mean).sample
    assert autoencoder_kl_wan.WanCausalConv3d.forward is original
    assert (expected - got).abs().max() < 1e-5


def test_two_thirds_of_the_crops_hold_the_outline_also_under_a_moving_camera():
    rng, grid, seen = np.random.default_rng(0), Grid(num_frames=29, height=2176, width=3808), []
    for number in range(200):
        scene, frame = world.sample_scene(rng, camera_share=1.0), number % 29
        crop = reconstruction._crop_at(rng, scene, grid, frame, 96)
        seen.append(world.near_object(scene, grid, cell=96, crop=crop, frames=range(frame, frame + 1)).any().item())
    assert 0.6 <= sum(seen) / len(seen) <= 0.8


@pytest.mark.parametrize("progress", [0.0, 0.9])
def test_reconstruction_gives_gradients_to_every_trained_parameter(progress):
    objective = Reconstruction(new_vae(), ReconstructionConfig(side=32, batch_single=2, batch_clip=1), torch.device("cpu"))
    loss, metrics = objective.loss(1, progress)
    loss.backward()
    assert torch.isfinite(loss) and np.isfinite(metrics["psnr"])
    # on single frames the convolutions over time alone are not used
    missing = [n for n, p in objective.module.named_parameters() if p.requires_grad and p.grad is None and not (progress == 0 and "time_conv" in n)]
    assert missing == []


def test_where_bfloat16_is_quicker_the_vae_computes_in_it_and_the_loss_does_not(monkeypatch):
    """The same loss, to what such numbers round, and gradients in the weights' own type."""
    losses, types, vae = {}, {}, new_vae()
    vae.decoder.conv_out.register_forward_hook(lambda module, given, made: types.__setitem__("convolutions", made.dtype))
    for dtype in (torch.float32, torch.bfloat16):
        monkeypatch.setattr("muralist.base.pick_dtype", lambda device, dtype=dtype: dtype)
        objective = Reconstruction(vae, ReconstructionConfig(side=32, batch_clip=1, single_share=0.0), torch.device("cpu"))
        loss, _ = objective.loss(1, 0.9)
        loss.backward()
        assert types["convolutions"] is dtype and loss.dtype is torch.float32 and vae.decoder.conv_out.weight.grad.dtype is torch.float32
        losses[dtype] = loss.item()
    assert losses[torch.float32] != losses[torch.bfloat16] == pytest.approx(losses[torch.float32], rel=0.02)


def test_a_vae_that_goes_on_is_held_to_its_earlier_latents_at_the_bases_own_scale_and_where_nothing_moves(monkeypatch):
    config = ReconstructionConfig(side=32, batch_clip=2, lengths=(5,), single_share=0.0)
    vae, same, other = new_vae(0), new_vae(0), new_vae(1)
    moving = 2 * torch.rand(2, 3, 5, 32, 32) - 1

    def pull(video, height):
        """What holding adds to the loss, where the earlier VAE is another one."""
        monkeypatch.setattr(reconstruction, "_batch", lambda *given: (video, torch.full((2,), height)))
        one, alike, free = (Reconstruction(vae, config, torch.device("cpu"), earlier).loss(1, 0.5)[0].item() for earlier in (other, same, None))
        assert alike == pytest.approx(free, abs=1e-5)
        return one - free

    frozen = moving[:, :, :1].expand_as(moving)
    assert pull(frozen, 2176) == pytest.approx(pull(frozen, 256), rel=1e-3)
    assert 0 < pull(moving, 2176) < 0.8 * pull(moving, 256)  # the first latent alone, a frame of its own


def test_latents_are_still_but_for_those_whose_pictures_or_neighbours_move():
    video = torch.zeros(1, 3, 9, 96, 96)
    video[..., 6, 70:, 70:] = 1.0  # the last but two: in the second group of four
    kept = still(video, (3, 6, 6))
    assert kept[:, :2].all()
    assert kept[0, 2].tolist() == [[not (row >= 3 and column >= 3) for column in range(6)] for row in range(6)]
    assert still(video[:, :, :1], (1, 6, 6)).all()


def test_errors_count_more_often_in_the_frames_and_places_that_move():
    moves = torch.zeros(1, 3, 2, 2, dtype=torch.bool)
    moves[0, 2, 1, 1] = True
    over = reconstruction._over_pixels(moves, torch.Size((9, 32, 32)))
    assert over.shape == (1, 1, 9, 32, 32)
    assert over[0, 0, 5:, 16:, 16:].all() and over.sum() == 4 * 16 * 16  # the frames of its latent, at its place
    assert not reconstruction._over_pixels(moves[:, :1], torch.Size((1, 8, 8))).any()


@pytest.mark.parametrize("changing", [False, True])
def test_what_moves_weighs_more_in_the_loss_and_what_stays_still_does_not(changing, monkeypatch):
    video = 2 * torch.rand(1, 3, 5, 32, 32) - 1
    video = video if changing else video[:, :, :1].expand_as(video)
    monkeypatch.setattr(reconstruction, "_batch", lambda *given: (video, torch.full((1,), 2176)))
    vae, plain = new_vae(), ReconstructionConfig(side=32, single_share=0.0, moving=1.0)
    weighed, same = (Reconstruction(vae, replace(plain, moving=weight), torch.device("cpu")).loss(1, 0.5)[0].item() for weight in (4.0, 1.0))
    assert weighed > 1.5 * same if changing else weighed == same


def test_band_error_sees_blur_and_not_phase():
    torch.manual_seed(0)
    sharp = torch.randn(2, 3, 1, 64, 64)
    blurred = nn.functional.avg_pool3d(sharp, (1, 3, 3), stride=1, padding=(0, 1, 1))
    assert band_error(torch.randn(2, 3, 1, 64, 64), sharp) < 0.3 < band_error(blurred, sharp)


@pytest.fixture
def old(monkeypatch):
    """A VAE of other layers."""
    with monkeypatch.context() as patch:
        patch.setattr(miniature, "VAE_CONFIG", miniature.VAE_CONFIG | dict(base_dim=32, dim_mult=[1, 1, 2, 2]))
        made = new_vae(seed=1)
    made.register_to_config(latents_mean=[0.5] * 48)
    return made


def test_a_vae_of_other_layers_takes_over_what_fits_and_is_taught_the_rest(old):
    vae, config = miniature._successor(old)
    assert config is TAUGHT_VAE and vae.config.dim_mult != old.config.dim_mult and vae.config.latents_mean == [0.5] * 48
    assert torch.equal(vae.decoder.conv_out.weight, old.decoder.conv_out.weight)
    assert vae.decoder.conv_in.weight.shape != old.decoder.conv_in.weight.shape
    same, config = miniature._successor(vae)
    assert config is FURTHER_VAE and all(torch.equal(weight, same.state_dict()[name]) for name, weight in vae.state_dict().items())


def test_a_taught_vae_keeps_what_its_latents_are_scaled_by_and_goes_on(old, tmp_path):
    old.save_pretrained(tmp_path / "base" / "vae")
    for steps, resume in ((1, False), (2, True)):
        made = train_vae(
            tmp_path / "run", length=Length(steps=steps), device=torch.device("cpu"), resume=resume, init=tmp_path / "base", report=lambda line: None
        )
    vae = AutoencoderKLWan.from_pretrained(made)
    assert vae.config.latents_mean == [0.5] * 48 and vae.config.dim_mult == new_vae().config.dim_mult
    with pytest.raises(UserError, match="has other layers"):
        train_decoder(tmp_path / "decoder", length=Length(steps=1), device=torch.device("cpu"), resume=False, vae=tmp_path / "base" / "vae")


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (dict(base_dim=8, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1), "latents have 16 channels, 8x8x4"),
        (dict(base_dim=8, z_dim=48, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.0] * 48, latents_std=[1.0] * 48), "48 channels, 8x8x4"),
    ],
)
def test_a_vae_of_other_latents_is_no_teacher(config, told, tmp_path):
    AutoencoderKLWan(**config).save_pretrained(tmp_path / "vae")
    with pytest.raises(UserError, match=told):
        train_vae(tmp_path / "run", length=Length(steps=1), device=torch.device("cpu"), resume=False, init=tmp_path)


@pytest.mark.parametrize("progress", [0.1, 0.9])
def test_a_taught_decoder_reads_its_teachers_latents_at_first_and_then_its_own_encoders(progress):
    config = ReconstructionConfig(side=32, batch_clip=1, lengths=(5,), single_share=0.0, taught=0.5, held=0.0, kl=0.0)
    vae = new_vae()
    objective = Reconstruction(vae, config, torch.device("cpu"), new_vae(1).requires_grad_(False))
    objective.loss(1, progress)[0].backward()
    assert vae.decoder.conv_in.weight.grad.abs().sum() > 0
    pull = vae.encoder.conv_in.weight.grad
    assert (pull is None or not pull.any()) == (progress < config.taught)


def test_a_taught_encoder_is_held_everywhere(monkeypatch):
    """Also in large clips where everything moves."""
    moving = 2 * torch.rand(1, 3, 5, 32, 32) - 1
    monkeypatch.setattr(reconstruction, "_batch", lambda *given: (moving, torch.full((1,), 2176)))
    vae, teacher = new_vae(), new_vae(1)

    def pull(progress):
        """What holding adds to the loss, and all that it could."""
        configs = (ReconstructionConfig(side=32, single_share=0.0, taught=0.5, held=held) for held in (1.0, 0.0))
        (held, metrics), (free, _) = (Reconstruction(vae, config, torch.device("cpu"), teacher).loss(1, progress) for config in configs)
        return (held - free).item(), metrics["drift"] ** 2

    taught, most = pull(0.49)
    assert taught == pytest.approx(most, rel=1e-3)
    assert 0 < pull(0.51)[0] < 0.8 * most  # the first latent alone


def test_a_new_decoder_keeps_the_encoder_and_its_statistics(tmp_path):
    old = new_vae()
    old.register_to_config(latents_mean=[0.5] * 48, latents_std=[2.0] * 48)
    old.save_pretrained(tmp_path / "old")
    made = train_decoder(tmp_path / "run", length=Length(steps=1), device=torch.device("cpu"), resume=False, vae=tmp_path / "old", report=lambda line: None)
    new = AutoencoderKLWan.from_pretrained(made)
    assert new.config.latents_mean == [0.5] * 48 and new.config.latents_std == [2.0] * 48
    assert all(torch.equal(p, new.encoder.state_dict()[name]) for name, p in old.encoder.state_dict().items())
    assert not torch.equal(old.decoder.conv_out.weight, new.decoder.conv_out.weight)


def test_a_decoder_goes_on_with_the_encoder_that_it_started_with(tmp_path):
    def train(source, resume=True):
        return train_decoder(
            tmp_path / "run", length=Length(steps=1), device=torch.device("cpu"), resume=resume, vae=tmp_path / source, report=lambda line: None
        )

    for seed, name in enumerate("ab"):
        new_vae(seed=seed).save_pretrained(tmp_path / name)
    train("a", resume=False)
    with pytest.raises(UserError, match="stand on another --from"):
        train("b")
    train("a")


def test_what_started_from_a_model_goes_on_with_that_model_alone(tmp_path):
    new_vae().save_pretrained(tmp_path / "a" / "vae")
    new_vae(seed=1).save_pretrained(tmp_path / "b" / "vae")

    def train(init, resume=True):
        return train_vae(tmp_path / "run", length=Length(steps=1), device=torch.device("cpu"), resume=resume, init=init, report=lambda line: None)

    made = AutoencoderKLWan.from_pretrained(train(tmp_path / "a", resume=False))
    assert made.config.latents_mean == new_vae().config.latents_mean  # latents of the base's own size stay, and so does what normalises them
    for other in (None, tmp_path / "b"):
        with pytest.raises(UserError, match="stand on another --init"):
            train(other)
    train(tmp_path / "a")


def test_longer_clips_are_fewer_and_their_number_of_frames_is_drawn(monkeypatch):
    config = ReconstructionConfig(side=32, lengths=(5, 9), batch_clip=2, single_share=0.0)
    assert [config.clips_of(frames) for frames in (5, 9, 29)] == [2, 1, 1]
    seen = []
    monkeypatch.setattr(
        reconstruction, "_batch", lambda rng, heights, count, frames, side: seen.append((count, frames)) or (torch.zeros(1, 3, 1, 32, 32), None)
    )
    objective = Reconstruction(new_vae(), config, torch.device("cpu"))
    for step in range(20):
        objective.loss(step, 0.5)
    assert set(seen) == {(2, 5), (1, 9)}
