"A run that takes a second: the settings and the images of the tests of training."

from mice.config import Config
from mice.data.images import digits

CFG = Config(
    arch="small",
    image_size=8,
    views="affine",
    n_clusters=3,
    dim=8,
    nu=64,
    ema=0.9,
    epochs=2,
    batch_size=32,
    warmup=1,
    device="cpu",
)
IMAGES = digits(8).images[:100]
