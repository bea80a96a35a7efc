"""What the other modules import of the standard library.

All of it before the first of them, so that what they are made of lies together
in memory; see `image.together`.
"""

import __future__

import array
import ast
import atexit
import collections.abc
import contextlib
import difflib
import gc
import hashlib
import importlib.util
import inspect
import io
import itertools
import json
import linecache
import opcode
import operator
import os
import py_compile
import random
import re
import runpy
import shutil
import stat
import struct
import sys
import time
import traceback
import types
import typing
import urllib.parse
import weakref
