"""A data set that tensorflow-datasets has: images of clothes, like MNIST.

Download it once, and train on it, with

  jaxrobust data prepare tfds:fashion_mnist
  jaxrobust train --workdir=runs/fashion --config=my_data_set.py
"""

from jaxrobust.config import classifier, dataset_info, registries

registries.DATASETS.register(
  'fashion_mnist',
  dataset_info.DatasetInfo(
    'fashion_mnist',
    image_shape=(28, 28, 1),
    num_classes=10,
    train_size=60_000,
    test_size=10_000,
    mean=(0.286,),
    std=(0.353,),
  ),
)


def get_config(arg: str = ''):
  """l-inf 0.1 with WRN-28-10, on real images."""
  c = classifier.get_config('fashion_mnist')
  c.threat.epsilon = 0.1
  return classifier.with_arg(c, arg, 'wrn-28-10,real')
