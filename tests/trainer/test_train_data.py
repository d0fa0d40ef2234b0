import gzip
import os

import numpy as np
import pytest
import torch
from PIL import Image

from epsrt.errors import EpsrtError, InputError
from epsrt_trainer.data import Images, load

RNG = np.random.default_rng


def pixels(*shape: int) -> np.ndarray:
    return RNG(0).integers(0, 256, shape, dtype=np.uint8)


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


def folder(path, sizes=((4, 4),) * 4, mode="RGB"):
    for k, (w, h) in enumerate(sizes):
        file = path / ("cat", "dog")[k % 2] / f"{k}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((h, w, 3), k, np.uint8)).convert(mode).save(file)
    return path


def test_digits():
    data = load("digits")
    assert data.images.shape == (1797, 1, 8, 8)
    assert (float(data.images.min()), float(data.images.max())) == (-1.0, 1.0)
    assert data.classes == 10
    assert data.class_names == tuple("0123456789")
    assert torch.equal(data.labels[:10], torch.arange(10))
    assert ((data.images + 1) * 8 == ((data.images + 1) * 8).round()).all()


def test_image_folder_with_classes(tmp_path):
    data = load(folder(tmp_path))
    assert data.images.dtype == torch.uint8
    assert data.shape == (3, 4, 4)
    assert data.class_names == ("cat", "dog")
    assert data.labels.tolist() == [0, 0, 1, 1]
    assert data.images[:, 0, 0, 0].tolist() == [0, 2, 1, 3]
    torch.testing.assert_close(data.batch(torch.tensor([1]))[0, 0, 0, 0], torch.tensor(2 / 127.5 - 1))


def test_flat_folder_and_grey(tmp_path):
    folder(tmp_path / "all", mode="L")
    data = load(tmp_path / "all" / "cat")
    assert data.labels is None
    assert data.classes == 0
    assert data.shape == (1, 4, 4)


def test_grey_among_colours_becomes_colour(tmp_path):
    folder(tmp_path)
    Image.fromarray(np.full((4, 4), 9, np.uint8)).save(tmp_path / "cat" / "grey.png")
    data = load(tmp_path)
    assert data.shape == (3, 4, 4)
    assert (data.images[2] == 9).all()


def test_mixed_sizes(tmp_path):
    folder(tmp_path, ((4, 4), (4, 4), (8, 6), (4, 4)))
    with pytest.raises(EpsrtError, match=r"2\.png is 8×6 but 0\.png is 4×4: give size"):
        load(tmp_path)
    assert load(tmp_path, size=2).shape == (3, 2, 2)
    with pytest.raises(EpsrtError, match="size = 0"):
        load(tmp_path, size=0)


def test_size_crops_the_middle(tmp_path):
    wide = np.zeros((4, 12, 3), np.uint8)
    wide[:, 4:8] = 200
    (tmp_path / "a").mkdir()
    Image.fromarray(wide).save(tmp_path / "a" / "x.png")
    assert (load(tmp_path, size=4).images == 200).all()


def test_broken_images(tmp_path):
    folder(tmp_path)
    broken = tmp_path / "cat" / "1.png"
    broken.write_bytes(b"no image")
    with pytest.raises(EpsrtError, match=r"1\.png is not a readable image"):
        load(tmp_path)
    said: list[str] = []
    data = load(tmp_path, skip_broken=True, log=said.append)
    assert len(data) == 4
    assert len(said) == 1
    assert "1.png" in said[0]
    assert tuple(said) == data.skipped


def test_a_cut_image_is_broken(tmp_path):
    Image.fromarray(pixels(32, 32, 3)).save(tmp_path / "a.png")
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(EpsrtError, match=r"a\.png is not a readable image"):
        load(tmp_path)
    with pytest.raises(EpsrtError, match="no readable image: 1 were skipped"):
        load(tmp_path, skip_broken=True)


def test_folders_that_are_no_data_set(tmp_path):
    with pytest.raises(EpsrtError, match="holds no images"):
        load(tmp_path)
    folder(tmp_path)
    Image.new("RGB", (4, 4)).save(tmp_path / "stray.png")
    with pytest.raises(EpsrtError, match=r"both class folders and images \(stray\.png\)"):
        load(tmp_path)


def test_deep_images_are_refused(tmp_path):
    Image.fromarray(np.zeros((4, 4), np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(EpsrtError, match=r"deep\.png has more than 8 bits"):
        load(tmp_path)


def test_cifar10(tmp_path):
    rows = pixels(4, 3073)
    rows[:, 0] = [3, 1, 9, 0]
    rows[:2].tofile(tmp_path / "data_batch_1.bin")
    rows[2:].tofile(tmp_path / "data_batch_2.bin")
    data = load(tmp_path)
    assert data.shape == (3, 32, 32)
    assert data.labels.tolist() == [3, 1, 9, 0]
    assert data.class_names[3] == "cat"
    assert (data.images.reshape(4, -1).numpy() == rows[:, 1:]).all()
    (tmp_path / "data_batch_1.bin").write_bytes(b"x" * 3074)
    with pytest.raises(EpsrtError, match=r"data_batch_1\.bin has 3,074 bytes"):
        load(tmp_path)
    rows[0, 0] = 10
    rows[:2].tofile(tmp_path / "data_batch_1.bin")
    with pytest.raises(EpsrtError, match="the label 10"):
        load(tmp_path)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_mnist(tmp_path, suffix):
    images, labels = pixels(3, 28, 28), np.array([7, 0, 9], np.uint8)
    pack = gzip.compress if suffix else bytes
    (tmp_path / f"train-images-idx3-ubyte{suffix}").write_bytes(pack(idx(images)))
    (tmp_path / f"train-labels-idx1-ubyte{suffix}").write_bytes(pack(idx(labels)))
    for spec in (tmp_path, tmp_path / f"train-images-idx3-ubyte{suffix}"):
        data = load(spec)
        assert data.shape == (1, 28, 28)
        assert (data.images[:, 0].numpy() == images).all()
        assert data.labels.tolist() == [7, 0, 9]
    (tmp_path / f"train-labels-idx1-ubyte{suffix}").write_bytes(pack(idx(labels[:2])))
    with pytest.raises(EpsrtError, match="has 2 labels for 3 images"):
        load(tmp_path)
    (tmp_path / f"train-labels-idx1-ubyte{suffix}").unlink()
    assert load(tmp_path).labels is None


def test_broken_mnist(tmp_path):
    file = tmp_path / "train-images-idx3-ubyte"
    file.write_bytes(idx(pixels(3, 28, 28))[:-1])
    with pytest.raises(EpsrtError, match=r"holds 2,351 bytes where its header says \[3, 28, 28\]"):
        load(tmp_path)
    file.write_bytes(b"\x00\x00\x0d\x03" + bytes(20))
    with pytest.raises(EpsrtError, match="starts with 00 00 0d 03"):
        load(tmp_path)
    file.unlink()
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(pixels(3, 28, 28)))[:-20])
    with pytest.raises(EpsrtError, match="not a whole gzip file"):
        load(tmp_path)


def test_npz(tmp_path):
    file = tmp_path / "a.npz"
    x = pixels(5, 6, 6, 3)
    np.savez(file, images=x, labels=np.array([0, 1, 2, 1, 0]))
    data = load(file)
    assert data.shape == (3, 6, 6)
    assert (data.images.numpy() == x.transpose(0, 3, 1, 2)).all()
    assert data.classes == 3
    np.savez(file, images=x[..., 0])
    assert load(file).shape == (1, 6, 6)
    np.savez(file, images=x.transpose(0, 3, 1, 2) / 127.5 - 1)
    assert load(file).images.dtype == torch.float32


def test_npz_with_names_of_classes_and_one_that_is_cut_off(tmp_path):
    file = tmp_path / "a.npz"
    np.savez_compressed(file, images=pixels(3, 6, 6), labels=np.array([0, 2, 2]), class_names=np.array(["a", "b", "c"]))
    data = load(file)
    assert (data.class_names, data.classes, data.labels.tolist()) == (("a", "b", "c"), 3, [0, 2, 2])
    whole = file.read_bytes()
    for kept in (len(whole) // 2, len(whole) - 1, 10, 0):
        file.write_bytes(whole[:kept])
        with pytest.raises(InputError, match=r"a\.npz is not a whole \.npz file \(.*\): copy or make it again$"):
            load(file)


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"images": np.zeros((1, 4, 4), np.uint8), "class_names": np.array(["a"])}, r"class_names are <U1 \[1\]"),
        (
            {"images": np.zeros((1, 4, 4), np.uint8), "labels": np.zeros(1, int), "class_names": np.array([1])},
            r"class_names are int64 \[1\]; save words \[classes\] and labels",
        ),
        ({"pictures": np.zeros(3)}, r"no array `images` \(it has pictures\)"),
        ({"images": np.zeros((2, 3), np.uint8)}, r"shape \[2, 3\]"),
        ({"images": np.zeros((2, 4, 4), np.int64)}, "images are int64"),
        ({"images": np.full((2, 4, 4), 255.0)}, r"span 255 … 255: scale them to \[−1, 1\]"),
        ({"images": np.full((2, 4, 4), np.nan)}, "span nan"),
        ({"images": np.zeros((2, 4, 4), np.uint8), "labels": np.zeros(3, int)}, r"labels are int64 \[3\]"),
        ({"images": np.zeros((2, 4, 4), np.uint8), "labels": np.zeros(2)}, "labels are float64"),
        ({"images": np.zeros((2, 4, 4), np.uint8), "labels": np.array([-1, 0])}, "count them from 0"),
        ({"images": np.array([{}, None])}, "pickled objects"),
    ],
)
def test_bad_npz(tmp_path, arrays, says):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(EpsrtError, match=says):
        load(tmp_path / "a.npz")


def test_files_of_no_known_format(tmp_path):
    (tmp_path / "a.npz").write_bytes(b"no archive")
    with pytest.raises(EpsrtError, match=r"a\.npz"):
        load(tmp_path / "a.npz")
    (tmp_path / "a.txt").write_text("hello")
    with pytest.raises(EpsrtError, match=r"a\.txt is not a data set"):
        load(tmp_path / "a.txt")
    with pytest.raises(EpsrtError, match="nowhere does not exist"):
        load("nowhere")
    with pytest.raises(EpsrtError, match="are for image folders: digits is none"):
        load("digits", size=16)


def test_flip_and_digest():
    x = torch.arange(8, dtype=torch.uint8).reshape(2, 1, 2, 2)
    data = Images(x, torch.tensor([0, 1]))
    plain = data.batch(torch.tensor([0, 1]))
    flipped = data.batch(torch.tensor([0, 1]), torch.tensor([True, False]))
    assert torch.equal(flipped[0], plain[0].flip(-1))
    assert torch.equal(flipped[1], plain[1])
    assert data.digest() == Images(x.clone(), torch.tensor([0, 1])).digest()
    assert len({data.digest(), Images(x).digest(), Images(x.flip(0), data.labels).digest()}) == 3


def test_images_refuse_other_shapes():
    with pytest.raises(EpsrtError, match=r"shape \[2, 4, 4\]"):
        Images(torch.zeros(2, 4, 4))
    with pytest.raises(EpsrtError, match=r"shape \[0, 1, 4, 4\]"):
        Images(torch.zeros(0, 1, 4, 4))
    with pytest.raises(EpsrtError, match=r"torch\.float64"):
        Images(torch.zeros(1, 1, 4, 4).double())


@pytest.mark.parametrize("name", ["pipe.npz", "pipe"])
def test_a_named_pipe_is_not_waited_for(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(InputError, match=f"{name} is no file: give digits, a folder, an .npz file"):
        load(str(tmp_path / name))
