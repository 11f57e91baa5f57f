"""What Beam finds out anew for each of a graph's transforms, found out once for all tests.

Half of the processor's time of a tiny job goes into three things of Beam's: the arguments of
functions and the flags of a class of options, which depend on code and flags alone, and the size of
each side input, for which it looks at all modules. Hundreds of tests run such jobs.
"""

import copy
import sys
import weakref

from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.runners.worker import statecache
from apache_beam.transforms import core


def install():
    """Makes Beam remember them, in this process."""
    core.get_function_args_defaults = remembered_arguments(core.get_function_args_defaults)
    PipelineOptions.__init__ = remembered_options(PipelineOptions.__init__)
    statecache.get_deep_size = lambda *cached: sum(map(sys.getsizeof, cached))


def remembered_arguments(find):
    """`get_function_args_defaults`, which remembers those of functions and methods."""
    known = weakref.WeakKeyDictionary()

    def found(function):
        # Of a method that is bound there is a new object at each time.
        key = getattr(function, "__func__", function)
        bound = key is not function
        try:
            mine = known.setdefault(key, {})
        except TypeError:  # what cannot be a key
            return find(function)
        if bound not in mine:
            mine[bound] = find(function)
        args, defaults = mine[bound]
        return list(args), list(defaults)

    return found


def remembered_options(initialize):
    """`PipelineOptions.__init__`, which reads the same flags once for each class of options."""
    known = {}

    def initialized(self, flags=None, **kwargs):
        if kwargs or flags is None or isinstance(flags, str):
            initialize(self, flags, **kwargs)
            return
        key = type(self), tuple(flags)
        if key not in known:
            initialize(self, flags)
            known[key] = copy.deepcopy(self._visible_options)
            return
        self._flags = flags
        self._visible_options = known[key]
        # A list is one that others may add to.
        self._all_options = {name: copy.copy(value) for name, value in vars(known[key]).items()}

    return initialized
