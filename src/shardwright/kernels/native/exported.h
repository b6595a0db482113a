// What Python calls; nothing else is seen from outside the library.

#pragma once

#define EXPORTED extern "C" __attribute__((visibility("default")))
