/* libllama, opened at run time: its functions under short names. */
#ifndef EDGETUNE_LLAMA_BRIDGE_H
#define EDGETUNE_LLAMA_BRIDGE_H

#include "llama_abi.h"

/* The functions of libllama; NULL before et_llama_open. */
struct et_llama_functions {
    void *handle;
#define ET_LLAMA_MEMBER(returned, name, parameters) returned(*name) parameters;
    ET_LLAMA_FUNCTIONS(ET_LLAMA_MEMBER, void, void *, void, void, struct et_llama_batch, struct et_llama_candidates)
#undef ET_LLAMA_MEMBER
};

extern struct et_llama_functions et_llama;

#endif
