/* Opens libllama (that of llama-cpp-python; Python passes its path). Nothing is linked, so the extension loads without
 * it. */
#include "llama_bridge.h"

#include "edgetune.h"

#include <dlfcn.h>
#include <stdio.h>
#include <string.h>

struct et_llama_functions et_llama;

bool et_llama_open(const char *path, char *message, size_t size) {
    if (et_llama.handle)
        return true;
    void *handle = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (!handle) {
        snprintf(message, size, "%s", dlerror());
        return false;
    }
    const struct {
        const char *name;
        void *slot;
    } symbols[] = {
#define ET_LLAMA_SYMBOL(returned, name, parameters) {"llama_" #name, &et_llama.name},
        ET_LLAMA_FUNCTIONS(ET_LLAMA_SYMBOL, void, void *, void, void, struct et_llama_batch, struct et_llama_candidates)
#undef ET_LLAMA_SYMBOL
    };
    for (size_t i = 0; i < sizeof symbols / sizeof symbols[0]; i++) {
        void *symbol = dlsym(handle, symbols[i].name);
        if (!symbol) {
            snprintf(message, size, "it has no function %s", symbols[i].name);
            dlclose(handle);
            return false;
        }
        memcpy(symbols[i].slot, &symbol, sizeof symbol); /* ISO C has no cast from object pointer to function pointer */
    }
    et_llama.handle = handle;
    return true;
}
