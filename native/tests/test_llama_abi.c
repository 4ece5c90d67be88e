/* Compiles only if src/llama_abi.h declares what the installed llama.h declares. There is nothing to run. */
#include <llama.h>

#include "llama_abi.h"

#define SAME_FUNCTION(returned, name, parameters)                                                                      \
    _Static_assert(__builtin_types_compatible_p(returned(*) parameters, __typeof__(&llama_##name)), "llama_" #name);
ET_LLAMA_FUNCTIONS(SAME_FUNCTION, struct llama_context, llama_memory_t, struct llama_vocab, struct llama_sampler,
                   struct llama_batch, struct llama_token_data_array)

#define SAME_MEMBER(ours, theirs, member)                                                                              \
    _Static_assert(offsetof(struct ours, member) == offsetof(struct theirs, member) &&                                 \
                       __builtin_types_compatible_p(__typeof__(((struct ours *)0)->member),                            \
                                                    __typeof__(((struct theirs *)0)->member)),                         \
                   "struct " #theirs ": " #member);
SAME_MEMBER(et_llama_batch, llama_batch, n_tokens)
SAME_MEMBER(et_llama_batch, llama_batch, token)
SAME_MEMBER(et_llama_batch, llama_batch, embd)
SAME_MEMBER(et_llama_batch, llama_batch, pos)
SAME_MEMBER(et_llama_batch, llama_batch, n_seq_id)
SAME_MEMBER(et_llama_batch, llama_batch, seq_id)
SAME_MEMBER(et_llama_batch, llama_batch, logits)
_Static_assert(sizeof(struct et_llama_batch) == sizeof(struct llama_batch), "struct llama_batch");

SAME_MEMBER(et_llama_candidate, llama_token_data, id)
SAME_MEMBER(et_llama_candidate, llama_token_data, logit)
SAME_MEMBER(et_llama_candidate, llama_token_data, p)
_Static_assert(sizeof(struct et_llama_candidate) == sizeof(struct llama_token_data), "llama_token_data");

#define SAME_PLACE(member)                                                                                             \
    _Static_assert(offsetof(struct et_llama_candidates, member) == offsetof(struct llama_token_data_array, member) &&  \
                       sizeof(((struct et_llama_candidates *)0)->member) ==                                            \
                           sizeof(((struct llama_token_data_array *)0)->member),                                       \
                   "llama_token_data_array: " #member);
SAME_PLACE(data)
SAME_PLACE(size)
SAME_PLACE(selected)
SAME_PLACE(sorted)
_Static_assert(sizeof(struct et_llama_candidates) == sizeof(struct llama_token_data_array), "llama_token_data_array");
