"""Every field of an evaluation, its default, and what it means. The other files here say only which
protocol it is.

    python main.py --config=configs/eval/knn.py --config.model=runs/quickstart/student \
        --config.data.root=~/flowers --workdir=runs/quickstart-knn
"""

from typing import Any

import ml_collections
from ml_collections import config_dict


def get_config() -> ml_collections.ConfigDict:
    """The constants of the paper and of DINOv2's evaluation: one list of all fields, and so longer
    than a function should be.
    """
    config: Any = ml_collections.ConfigDict()

    # The protocol, of proteus_jax/evaluation/protocols/: knn, ridge, linear, finegrained,
    # robustness or analysis.
    config.protocol = "knn"
    # What is evaluated: whatever proteus_jax.load takes.
    config.model = ""
    # The start of every random number.
    config.seed = 0
    # Images at a time over all devices; in linear, images of a step.
    config.batch = 512
    # Precision of the model's matmuls: float32, bfloat16, or auto (bfloat16 on accelerators).
    config.precision = "auto"

    config.data = ml_collections.ConfigDict()
    # Where the images are. A folder with train/ and test/ (or val/), one folder a class in each;
    # tfds:NAME; or one folder a class, of which every fifth image is tested on.
    config.data.root = ""
    # Values that become black and white in images of more than 8 bits: auto, full, or LOW,HIGH.
    # full is all that a file's numbers can hold; auto is full where a file uses the upper half of
    # that, and the file's own smallest and largest value where it does not.
    config.data.range = "auto"
    # What becomes of transparency: drop, or a color that images are laid on, as white or #808080.
    # Where it is dropped, hidden colors show.
    config.data.alpha = "drop"
    # The column of images in parquet files; found where none is named.
    config.data.image_column = ""
    # The column of classes in parquet files; found where none is named.
    config.data.label_column = ""
    # The shorter side that an image is resized to, in pixels.
    config.data.resize = 256
    # The side of the center square that is cut out of it.
    config.data.crop = 224
    # Processes that decode. Where none is given: the host's cores less two.
    config.data.workers = config_dict.placeholder(int)
    # Threads that decode where there are no worker processes.
    config.data.threads = 4

    config.knn = ml_collections.ConfigDict()
    # Numbers of neighbors; those above the number of training images are left out.
    config.knn.neighbours = (10, 20, 100, 200)
    # A neighbor's vote is exp(cosine / temperature).
    config.knn.temperature = 0.07

    config.linear = ml_collections.ConfigDict()
    # Passes over the training images.
    config.linear.epochs = 10.0
    # Rates for a batch of 256. Each is a head for each number of blocks, with and without the mean
    # of the patch tokens.
    config.linear.learning_rates = (
        *(1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4),
        *(1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1),
    )
    # Last blocks whose class tokens a head sees.
    config.linear.blocks = (1, 4)
    # Share of the training images, of each class, that heads are chosen by and do not learn from. 0
    # leaves only the paper's choice, by the test set.
    config.linear.held_out = 0.05
    # Whether features of center crops are kept in the workdir, in place of random crops. That is
    # much faster, and not the paper's protocol.
    config.linear.cache = False

    config.finegrained = ml_collections.ConfigDict()
    # Names of data sets; where none are given, all twelve.
    config.finegrained.datasets = ()

    config.robustness = ml_collections.ConfigDict()
    # The workdir of a linear evaluation of the same model, on ImageNet. Below data.root lie
    # imagenet-a, imagenet-r, imagenet-sketch, imagenet-v2 and imagenet-c.
    config.robustness.head = ""

    config.analysis = ml_collections.ConfigDict()
    # With whom the model is compared: whatever proteus_jax.load takes.
    config.analysis.teacher = ""
    # At most so many images of data.root, which needs no classes.
    config.analysis.images = 512
    # A misspelt field in a file that starts from this one is an error from here on.
    return config.lock()
