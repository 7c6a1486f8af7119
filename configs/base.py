"""Every field of a run, its default, and what it means. The other files here say only what they
change.

Any field can be set on the command line: --config.data.root=~/photos --config.batch=256
"""

from typing import Any

import ml_collections
from ml_collections import config_dict


def get_config() -> ml_collections.ConfigDict:
    """The recipe of the paper (arXiv 2407.10366): 300 epochs, batch 1024, AdamW, all three losses.

    One list of all fields, to be read from top to bottom, and so longer than a function should be.
    """
    config: Any = ml_collections.ConfigDict()

    # The teachers by name; the primary one is called teacher, and
    # base.add_teacher(config, "clip", "clip_vitb16") adds another.
    config.teachers = ml_collections.ConfigDict({"teacher": _teacher("dinov2_vitb14")})
    teachers: Any = config.teachers
    # The primary teacher: a known name, hf:ORG/NAME, a path or an address
    # (teachers.teacher.source).
    config.teacher = teachers.teacher.get_ref("source")
    # Students: names of proteus_jax/models/config.py; several learn from one pass of the teacher.
    config.student = ("vit_small",)
    config.init = ml_collections.ConfigDict()
    # What students start from: random weights, a copy of a model, or a slice of a larger one.
    config.init.method = "random"
    # The model that is copied or sliced; where none is named, the primary teacher is sliced. A copy
    # is as wide as the student and has as many blocks or a multiple, of which every second, third
    # ... is taken. The model's other choices are the student's too.
    config.init.source = ""
    # What the heads start from: random weights, or least_squares, on images of the run.
    config.init.heads = "random"
    # Number of training images that slices and heads are fitted on.
    config.init.images = 512
    # Factor of what a sliced student writes into its stream. Its norms take it out again; the
    # larger it is, the smaller is an update beside the weights.
    config.init.stream_scale = 1.0
    # Random seed of the run.
    config.seed = 0

    # Images of a step, over all devices and hosts; an even number if patches are masked.
    config.batch = 1024
    # Length of training in passes over the images. A run, a finished one too, may be given another:
    # the learning rate follows the new length from there on.
    config.epochs = 300.0
    # Length of training in steps, in place of epochs where it is given.
    config.steps = config_dict.placeholder(int)

    # Peak learning rate; None takes 5e-4 for each 512 images of the batch.
    config.learning_rate = config_dict.placeholder(float)
    config.optimizer = ml_collections.ConfigDict()
    # The optimizer: adamw (the paper's), or muon for the kernels of the blocks and adamw for the
    # rest.
    config.optimizer.name = "adamw"
    # Peak learning rate of Muon's kernels; learning_rate is that of the rest.
    config.optimizer.muon_learning_rate = 3e-3
    config.optimizer.rates = ml_collections.ConfigDict()
    # Factor of the learning rates of patch embedding, position table and tokens.
    config.optimizer.rates.embedding = 1.0
    # Factor of the learning rates of the blocks and the last norm.
    config.optimizer.rates.blocks = 1.0
    # Factor of the learning rates of the heads.
    config.optimizer.rates.heads = 1.0
    # Linear warm-up in epochs.
    config.optimizer.warmup_epochs = 5.0
    # Linear warm-up in steps, in place of epochs where it is given.
    config.optimizer.warmup_steps = config_dict.placeholder(int)
    # Weight decay on matrices and tables; vectors and biases have none.
    config.optimizer.weight_decay = 0.05
    # Dtype of AdamW's first moment: float32, or bfloat16, which halves its memory.
    config.optimizer.mu_dtype = "float32"
    # Decay of an average of the backbone's weights (the paper's: 0.99996); 0 keeps none. It is
    # saved and exported beside them.
    config.ema_decay = 0.0
    # Stochastic depth rate of the last block, rising from 0 at the first; the paper's runs have
    # none.
    config.drop_path = 0.0

    config.method = ml_collections.ConfigDict()
    # What students learn of their teachers: proteus (the paper's three losses), or another method.
    # proteus_jax/methods/registry.py lists them.
    config.method.name = "proteus"
    config.method.loss_weights = ml_collections.ConfigDict()
    # Factor of the loss of class tokens, for every teacher without one of its own.
    config.method.loss_weights.token = 1.0
    # Factor of the loss of all tokens.
    config.method.loss_weights.feature = 1.0
    # Factor of the loss of masked patches; 0 for all teachers leaves the masked pass out.
    config.method.loss_weights.patch = 1.0
    # Share of the patches that is masked, on half of the images.
    config.method.mask_ratio = 0.5

    # Precision of the student's matmuls: float32, bfloat16, or auto (bfloat16 on accelerators,
    # float32 on a CPU).
    config.precision = "auto"
    # Precision of the teacher's matmuls: the same, or float16 as in the authors' code (GPUs). Its
    # residual stream is float32 in any case.
    config.teacher_precision = "auto"
    # Devices that share one copy of parameters and optimizer; 1 keeps a whole copy on each.
    config.fsdp = 1
    # Gradient accumulation: parts of a batch, one after the other; less memory for the same update.
    config.grad_accum_steps = 1
    # What the student's backward pass computes again: off or blocks. Off keeps what matmuls made;
    # blocks keeps only what enters a block, a fraction of the memory for a third more of the
    # student's arithmetic.
    config.remat = "off"
    # Attention's implementation: auto (the fastest here), xla, pallas (TPUs) or cudnn (GPUs, 16
    # bits).
    config.attention = "auto"
    # Required number of hosts, where given; a run that finds another number stops at once.
    config.hosts = config_dict.placeholder(int)
    # Required number of devices of each host, where given.
    config.devices = config_dict.placeholder(int)

    config.data = ml_collections.ConfigDict()
    # Where the images are: one place, or several separated by commas. A place is a folder, searched
    # to its bottom; a text file of paths; one image; tar, zip, parquet or ArrayRecord files (as
    # DIR/train-*.parquet, or their folder); tfds:NAME; gs:// and s3:// (docs/data.md says which);
    # what --doctor wrote; or "scikit-image": the nineteen pictures of that wheel. No labels are
    # needed.
    config.data.root = ()
    # Shares of several places in the mixture; none for shares by their numbers of images.
    config.data.weights = ()
    config.data.subset = ml_collections.ConfigDict()
    # Share of the classes that is trained on.
    config.data.subset.classes = 1.0
    # Share of the images of each of these classes.
    config.data.subset.images = 1.0
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
    # Number of images that count as one epoch; where none is given, as many as there are.
    config.data.epoch = config_dict.placeholder(int)
    # Consecutive augmented views of each image; the length of an epoch is unchanged.
    config.data.repeated_aug = 3
    # Side of the training crops in pixels, a multiple of the patch size (14).
    config.data.crop = 224
    config.data.randaugment = ml_collections.ConfigDict()
    # RandAugment: operations per image; 0 turns it off.
    config.data.randaugment.operations = 2
    # RandAugment: magnitude of the operations, from 0 to 10.
    config.data.randaugment.magnitude = 9.0
    # RandAugment: standard deviation of the magnitude.
    config.data.randaugment.deviation = 0.5
    # RandAugment: probability of each operation to be applied.
    config.data.randaugment.probability = 0.5
    # Random erasing: share of the images that get a box of noise.
    config.data.erasing = 0.25
    # Processes that decode and augment; None takes the host's cores less two, and none on a host of
    # four cores or fewer.
    config.data.workers = config_dict.placeholder(int)
    # Threads that decode and augment where there are no worker processes.
    config.data.threads = 4
    # A run stops when a larger share of the images than this cannot be read.
    config.data.max_corrupt_fraction = 0.1
    config.data.held_out = ml_collections.ConfigDict()
    # Share of the images that is never trained on; 0 holds out none.
    config.data.held_out.share = 0.02
    # The least number of images that is held out.
    config.data.held_out.minimum = 16
    # The largest number of images that is held out.
    config.data.held_out.maximum = 1024
    # The least number of fixed views of held-out images that are compared with the teacher.
    config.data.held_out.views = 128

    config.eval = ml_collections.ConfigDict()
    # Images with classes, on which student and teacher are measured. A folder with train/ and test/
    # (or val/), one folder a class in each; one folder a class; tfds:NAME; or "scikit-image": which
    # of its pictures a tile is of, where data.root names them too.
    config.eval.root = ""
    # Protocols that measure on eval.root, of proteus_jax/evaluation/protocols/.
    config.eval.protocols = ("knn", "ridge")

    # Steps between two rows of metrics.jsonl.
    config.log_every = 50
    # Steps between two measurements on held-out views and on images with classes.
    config.eval_every = 5000
    # Steps between two checkpoints.
    config.checkpoint_every = 2500
    # Updates in a row that may be skipped, as a loss or gradient is not finite, before a run stops.
    config.max_skipped = 10
    # How many of the newest checkpoints are kept.
    config.keep_checkpoints = 3
    # Steps between two checkpoints that are kept for ever, where given.
    config.keep_every = config_dict.placeholder(int)
    # Saves in a row that may fail, e.g. on a full disk, before a run stops; 0 stops at the first.
    config.max_failed_saves = 3
    # Seconds from a request to stop (SIGTERM, Ctrl-C) after which a run ends, saved or not.
    config.preemption_timeout_s = 300.0
    # A misspelt field in a file that starts from this one is an error from here on.
    return config.lock()


def add_teacher(config: Any, name: str, source: str) -> Any:
    """Adds a teacher to a configuration, and returns its fields to be changed.

    Its tokens are standardized, as teachers differ in scale.
    """
    if name in config.teachers:
        raise ValueError(f"there is a teacher {name!r} already")
    teacher = _teacher(source)
    teacher.standardize = True
    with config.teachers.unlocked():
        config.teachers[name] = teacher.lock()
    return config.teachers[name]


def _teacher(source: str) -> Any:
    teacher: Any = ml_collections.ConfigDict()
    # The model: a known name (python convert_weights.py list), a directory or an address.
    teacher.source = source
    # Channel statistics of its images: native (its own), imagenet, clip or half (mean and std 0.5).
    # The students see the primary teacher's.
    teacher.normalization = "native"
    # Side of its images in pixels, if different from data.crop; a multiple of its patch size.
    teacher.image_size = config_dict.placeholder(int)
    # Whether its tokens are brought to mean 0 and deviation 1 in every channel first.
    teacher.standardize = False
    teacher.loss_weights = ml_collections.ConfigDict()
    # Factor of its token loss; defaults to method.loss_weights.token.
    teacher.loss_weights.token = config_dict.placeholder(float)
    # Factor of its feature loss; defaults to method.loss_weights.feature.
    teacher.loss_weights.feature = config_dict.placeholder(float)
    # Factor of its patch loss; defaults to method.loss_weights.patch.
    teacher.loss_weights.patch = config_dict.placeholder(float)
    return teacher
